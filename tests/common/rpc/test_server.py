import queue
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from spectrumkv.common.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from spectrumkv.common.rpc import server as rpc
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.rpc.scope import RpcScope
from spectrumkv.common.rpc.status import error_from_rpc
from spectrumkv.v1 import decode_pb2, prefill_pb2, prefill_pb2_grpc
from tests.common.rpc.scripted import HEALTH, WAIT_SECONDS, echo, make_server, response, served, wait
from tests.waiting import until

INFO = prefill_pb2.PrefillServiceGetServerInfoRequest()
SERVICES = ("", "spectrumkv.v1.PrefillService")


class Held:
    """A handler that answers once, and again when it is let go."""

    def __init__(self):
        self.running = queue.SimpleQueue()
        self.go = threading.Event()
        self.left = queue.SimpleQueue()

    def __call__(self, request, context):
        with RpcScope(context, 60.0) as scope:
            scope.on_end(self.go.set)
            try:
                yield response("first")
                self.running.put(None)
                wait(self.go)
                scope.check()
                yield response("last")
            finally:
                self.left.put(None)

    def wait_until_running(self, count=1):
        for _ in range(count):
            self.running.get(timeout=WAIT_SECONDS)


def drained(server, grace=60.0):
    """Start to drain; return the thread that does and the event that hurries it."""
    hurried = threading.Event()
    thread = threading.Thread(target=server.server.drain, args=(grace, hurried))
    thread.start()
    return thread, hurried


def join(thread):
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


def test_a_port_in_use_is_refused_with_a_sentence():
    with (
        served() as server,
        pytest.raises(InvalidArgumentError, match=f"cannot listen on {server.address}: .*another server using"),
    ):
        make_server().bind(server.address)


@pytest.mark.parametrize("address", ["203.0.113.1:0", "no.such.host.invalid:50051"])
def test_an_address_of_another_machine_is_refused_with_a_sentence(address):
    with pytest.raises(InvalidArgumentError, match=f"cannot listen on {address}"):
        make_server().bind(address)


def test_health_answers_only_once_the_server_serves():
    server = make_server()
    with open_channel(f"127.0.0.1:{server.bind('127.0.0.1:0')}") as channel:
        stub = rpc.health_pb2_grpc.HealthStub(channel)
        for name in SERVICES:
            assert (
                server._health.Check(health_pb2.HealthCheckRequest(service=name), None).status == HEALTH.NOT_SERVING
            )
        early = stub.Check.future(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS, wait_for_ready=True)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS, wait_for_ready=True)
        assert not early.done()
        server.start()
        # The first statuses may have been sent while the server was starting.
        assert HEALTH.SERVING in (one.status for one in watch)
        early.result()
        for name in SERVICES:
            checked = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT_SECONDS)
            assert checked.status == HEALTH.SERVING
    server.drain(0, threading.Event())


def test_draining_is_not_ready_at_once_refuses_new_requests_and_lets_the_running_one_finish():
    held = Held()
    with served(held) as server:
        call = server.generate()
        held.wait_until_running()
        watch = server.watch()
        assert next(watch).status == HEALTH.SERVING
        thread, _ = drained(server)
        assert next(watch).status == HEALTH.NOT_SERVING
        with open_channel(server.address) as late, pytest.raises(grpc.RpcError) as caught:
            list(prefill_pb2_grpc.PrefillServiceStub(late).Generate(prefill_pb2.GenerateRequest(), timeout=5))
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
        assert server.code() == "UNAVAILABLE"
        assert thread.is_alive()
        held.go.set()
        assert [one.token.text for one in call] == ["first", "last"]
        # Whoever watches the health does not hold the process up for the whole grace.
        join(thread)
        assert server.code() == "OK"


def test_draining_an_idle_server_that_is_watched_takes_no_grace():
    with served() as server:
        watch = server.watch()
        next(watch)
        thread, hurried = drained(server)
        join(thread)
        assert hurried.is_set()


@pytest.mark.parametrize("how", ["grace ends", "second signal"])
def test_what_still_runs_is_ended(how):
    held = Held()
    with served(held) as server:
        call = server.generate()
        held.wait_until_running()
        thread, hurried = drained(server, grace=0.2 if how == "grace ends" else 60.0)
        if how == "second signal":
            assert thread.is_alive()
            hurried.set()
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        join(thread)
        held.left.get(timeout=WAIT_SECONDS)
        assert isinstance(error_from_rpc(caught.value), UnavailableError)
        assert server.code() == "CANCELLED"


def test_more_requests_than_places_are_refused_at_once_while_health_and_info_answer():
    held, places = Held(), 3
    with served(held, threads=places) as server:
        calls = [server.generate() for _ in range(places)]
        held.wait_until_running(places)
        for _ in range(rpc.SPARE_THREADS + rpc.WATCHERS):
            with pytest.raises(grpc.RpcError) as caught:
                next(server.generate())
            refused = error_from_rpc(caught.value)
            assert isinstance(refused, ResourceExhaustedError)
            assert refused.message.startswith(f"{places} requests are in this server")
            assert refused.retry_after_seconds == 1.0
            assert server.code() == "RESOURCE_EXHAUSTED"
        assert server.health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS).status == HEALTH.SERVING
        request = prefill_pb2.PrefillServiceGetServerInfoRequest()
        assert server.prefill.GetServerInfo(request, timeout=WAIT_SECONDS).version == "1"
        held.go.set()
        assert [[one.token.text for one in call] for call in calls] == [["first", "last"]] * places
        assert [one.token.text for one in server.generate()] == ["first", "last"]


def test_watchers_are_bounded_and_leave_places_for_requests():
    with served(threads=1) as server:
        watches = [server.watch() for _ in range(rpc.WATCHERS)]
        for watch in watches:
            assert next(watch).status == HEALTH.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(server.watch())
        # What gRPC's own clients take as "not watched" and not as "ill".
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert [one.token.text for one in server.generate()] == ["yes"]
        for watch in watches:
            watch.cancel()
        assert server.code() == "OK"


def test_watchers_that_come_and_go_do_not_lock_the_server_up():
    # With grpcio-health-checking's non-blocking watchers, this hung within a second.
    failures = queue.SimpleQueue()

    def come_and_go():
        try:
            with open_channel(server.address) as channel:
                stub = rpc.health_pb2_grpc.HealthStub(channel)
                for _ in range(100):
                    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)
                    next(watch)
                    watch.cancel()
        except grpc.RpcError as error:
            failures.put(error)

    with served() as server:
        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            join(thread)
    assert failures.empty()


def test_a_channel_finds_a_restarted_server_within_two_seconds():
    first = make_server()
    address = f"127.0.0.1:{first.bind('127.0.0.1:0')}"
    first.start()
    with open_channel(address) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        assert len(list(stub.Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS))) == 1
        first.drain(0, threading.Event())
        # Each attempt that fails lengthens the pause before the next: long enough here to reach the longest.
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(prefill_pb2.GenerateRequest(), timeout=2.5, wait_for_ready=True))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        second = make_server()
        second.bind(address)
        second.start()
        started_at = time.monotonic()
        call = stub.Generate(prefill_pb2.GenerateRequest(), timeout=WAIT_SECONDS, wait_for_ready=True)
        assert len(list(call)) == 1
        assert time.monotonic() - started_at < 2.0
        second.drain(0, threading.Event())


def listed_services(server):
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(stub.ServerReflectionInfo(iter([request]), timeout=WAIT_SECONDS))
    return {one.name for one in answer.list_services_response.service}


def test_reflection_lists_the_services_behind_its_flag():
    with served(reflection=True) as server:
        assert listed_services(server) >= {"spectrumkv.v1.PrefillService", "grpc.health.v1.Health"}
        assert server.codes.empty()


def test_reflection_is_off_by_default():
    with served() as server:
        with pytest.raises(grpc.RpcError) as caught:
            listed_services(server)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_client_that_half_closes_ends_an_echo_with_ok():
    with served(echo, stream="Decode") as server:
        requests = [decode_pb2.DecodeRequest()] * 5
        assert len(list(server.decode.Decode(iter(requests), timeout=WAIT_SECONDS))) == 5
        assert server.code() == "OK"


def test_a_connection_gets_no_new_calls_once_it_is_old_and_its_running_ones_go_on():
    held = Held()
    callers = []

    def info(request, context):
        callers.append(context.peer())
        return prefill_pb2.PrefillServiceGetServerInfoResponse()

    with served(held, info=info, connection_seconds=0.2) as server:
        call = server.generate()
        assert next(call).token.text == "first"
        until(lambda: server.prefill.GetServerInfo(INFO) and len(set(callers)) >= 3)
        held.go.set()
        assert [one.token.text for one in call] == ["last"]


def test_a_connection_grows_old_only_where_that_is_asked_for():
    callers = set()

    def info(request, context):
        callers.add(context.peer())
        return prefill_pb2.PrefillServiceGetServerInfoResponse()

    with served(info=info) as server:
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            server.prefill.GetServerInfo(INFO)
        assert len(callers) == 1


def test_it_is_ready_from_its_start_until_it_refuses():
    server = make_server()
    server.bind("127.0.0.1:0")
    assert not server.ready
    server.start()
    assert server.ready
    server.refuse()
    assert not server.ready
    server.drain(0, threading.Event())
