"""What the INT4 probe found, and what follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.v1 import prefill_pb2

TRIALS = 3
TRIALS_TO_PASS = 2
SOURCES = ("probe", "cache", "flag")
FLAGS = ("on", "off")


@dataclass(frozen=True)
class ProbeTrial:
    """One needle-in-a-haystack question.

    Attributes:
        prompt_tokens: length of the prompt.
        depth: where the needle was, from 0 (start) to 1 (end).
        found: whether the model found it over the received KV.
        found_fp16: whether it found it over the exact KV.
        answer: what it said over the received KV.
    """

    prompt_tokens: int
    depth: float
    found: bool
    found_fp16: bool
    answer: str

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise InvalidArgumentError(f"a probe trial has {self.prompt_tokens} prompt tokens; it needs at least 1")
        if not 0 <= self.depth <= 1:
            raise InvalidArgumentError(f"a probe trial has its needle at depth {self.depth}; valid: 0 to 1")


@dataclass(frozen=True)
class ProbeVerdict:
    """Whether a model keeps its wits when tokens are sent at INT4.

    Attributes:
        int4_allowed: it does.
        source: "probe": just found out. "cache": found out at an earlier start. "flag": said by the operator.
        reason: a sentence for people.
        trials: what it rests on; none for a flag.
    """

    int4_allowed: bool
    source: str
    reason: str
    trials: tuple[ProbeTrial, ...]

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InvalidArgumentError(f"the verdict's source is {self.source!r}; valid: {', '.join(SOURCES)}")
        if not self.reason:
            raise InvalidArgumentError("the verdict gives no reason")
        expected = 0 if self.source == "flag" else TRIALS
        if len(self.trials) != expected:
            raise InvalidArgumentError(
                f"a verdict of source {self.source!r} rests on {len(self.trials)} trials; it must be {expected}"
            )

    @classmethod
    def from_trials(cls, trials: Sequence[ProbeTrial]) -> "ProbeVerdict":
        """Judge: at least two of three needles are to be found (SpectrumKV, arXiv 2606.08635, INT4 probe).

        A model that does not find them over its exact KV either was not put to the test, and gets no INT4.

        Raises:
            InvalidArgumentError: these are not three trials.
        """
        found = sum(trial.found for trial in trials)
        exact = sum(trial.found_fp16 for trial in trials)
        if exact < TRIALS_TO_PASS:
            allowed = False
            reason = (
                f"the model finds {exact} of {TRIALS} needles over its exact KV, so the probe can tell nothing "
                "about INT4; --int4 on allows it all the same"
            )
        else:
            allowed = found >= TRIALS_TO_PASS
            reason = (
                f"with INT4 the model finds {found} of {TRIALS} needles, {TRIALS_TO_PASS} are wanted; "
                f"over its exact KV it finds {exact}"
            )
        return cls(allowed, "probe", reason, tuple(trials))

    @classmethod
    def from_flag(cls, flag: str) -> "ProbeVerdict":
        """Return the verdict that `--int4` "on" or "off" dictates.

        Raises:
            InvalidArgumentError: `flag` is neither.
        """
        if flag not in FLAGS:
            raise InvalidArgumentError(f"--int4 is {flag!r}; allowed: one of auto, {', '.join(FLAGS)}")
        return cls(flag == "on", "flag", f"set by --int4 {flag}", ())

    def to_proto(self) -> prefill_pb2.ProbeVerdict:
        """The message that clients see and the cache keeps."""
        return prefill_pb2.ProbeVerdict(
            int4_allowed=self.int4_allowed,
            source=self.source,
            reason=self.reason,
            trials=[
                prefill_pb2.ProbeTrial(
                    prompt_tokens=trial.prompt_tokens,
                    depth=trial.depth,
                    found=trial.found,
                    found_fp16=trial.found_fp16,
                    answer=trial.answer,
                )
                for trial in self.trials
            ],
        )

    @classmethod
    def from_proto(cls, message: prefill_pb2.ProbeVerdict) -> "ProbeVerdict":
        """Read the message.

        Raises:
            InvalidArgumentError: it contradicts itself.
        """
        trials = tuple(
            ProbeTrial(trial.prompt_tokens, trial.depth, trial.found, trial.found_fp16, trial.answer)
            for trial in message.trials
        )
        return cls(message.int4_allowed, message.source, message.reason, trials)
