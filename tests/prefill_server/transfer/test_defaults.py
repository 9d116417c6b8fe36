"""Defaults that no request could use are refused before a model is loaded."""

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.transfer.plan import check_defaults


@pytest.mark.parametrize("policy", list(policies))
def test_every_policy_may_be_the_default(policy: str) -> None:
    check_defaults(build(PrefillConfig, {"policy": policy}))
    check_defaults(build(PrefillConfig, {"policy": policy, "budget": str(policies.get(policy).max_budget)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "magic"}, "unknown policy 'magic'; allowed: spectral"),
        ({"scorer": "magic"}, "unknown scorer 'magic'; allowed: attention"),
        ({"codec": "magic"}, "unknown codec 'magic'; allowed: absmax"),
        ({"codec": "native"}, "--codec is 'native', which does not write all tiers; .*: absmax"),
        ({"policy": "uniform-int8", "budget": "0.3"}, "cannot keep to budget 0.3; allowed is from 0.5 to 1"),
    ],
)
def test_a_default_that_nobody_could_use_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        check_defaults(build(PrefillConfig, options))
