"""Serve `/workers`: the prefill services and their decode workers, and what they do now."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from spectrumkv.client.async_client import AsyncSpectrumClient
from spectrumkv.common.errors import PermissionDeniedError, SpectrumKVError, UnauthenticatedError
from spectrumkv.gateway.gateway import caller_of, gateway_of
from spectrumkv.v1 import prefill_pb2

router = APIRouter()
# How long each prefill service may take to answer.
INFO_SECONDS = 5.0
_KINDS = {prefill_pb2.BUDGET_KIND_BYTES: "bytes", prefill_pb2.BUDGET_KIND_TIER_COST: "tier_cost"}


@router.get("/workers")
async def workers(request: HttpRequest) -> dict[str, Any]:
    """Return what each prefill service says of itself and of its decode workers."""
    authorization = caller_of(request).authorization
    prefills = gateway_of(request).prefills
    said = await asyncio.gather(*(_ask(*one, authorization) for one in prefills.items()))
    return {"prefill": said}


async def _ask(address: str, client: AsyncSpectrumClient, authorization: str | None) -> dict[str, Any]:
    """Return what one prefill service says; where it cannot be asked, why.

    Raises:
        UnauthenticatedError: the caller has no token that the service accepts.
        PermissionDeniedError: the service says nothing to this caller.
    """
    try:
        info = await client.server_info(INFO_SECONDS, authorization)
    except (UnauthenticatedError, PermissionDeniedError):
        raise
    except SpectrumKVError as error:
        return {"address": address, "answers": False, "error": error.message}
    return {"address": address, "answers": True, **_prefill(info)}


def _prefill(info: prefill_pb2.PrefillServiceGetServerInfoResponse) -> dict[str, Any]:
    defaults = {name: getattr(info.defaults, name) for name in ("policy", "budget", "scorer", "codec", "scope")}
    rooms = {room.address: room for room in info.decode_worker_rooms}
    return {
        "version": info.version,
        "model": info.model_name,
        "device": info.device,
        "layers": info.model.layers,
        "has_chat_template": info.has_chat_template,
        "requests_running": info.requests_running,
        "requests_waiting": info.requests_waiting,
        "policies": [
            {
                "name": one.name,
                "min_budget": one.min_budget,
                "max_budget": one.max_budget,
                "budget_kind": _KINDS[one.budget_kind],
            }
            for one in info.policies
        ],
        "defaults": defaults,
        "decode_workers": [
            _decode_worker(address, info, rooms.get(address, prefill_pb2.DecodeWorkerRoom()))
            for address in info.decode_workers
        ],
    }


def _decode_worker(
    address: str, info: prefill_pb2.PrefillServiceGetServerInfoResponse, room: prefill_pb2.DecodeWorkerRoom
) -> dict[str, Any]:
    if address in info.decode_workers_away:
        state = "away"
    else:
        state = "ejected" if address in info.decode_workers_ejected else "serving"
    return {"address": address, "state": state, "slots_total": room.slots_total, "slots_free": room.slots_free}
