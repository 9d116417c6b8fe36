"""The policy "spectral": a budget in bytes, spent by the codec of that name.

Policy and codec share a name, since neither is of use without the other; `codecs.spectral` says how it decides. So
there is nothing here but what a request may ask for. It is a file of its own because every policy is one.
"""

from spectrumkv.common.kv.policies.base import Policy, policies

spectral = policies.register("spectral")(
    Policy("spectral", min_budget=0.05, max_budget=1.0, codec="spectral", needs_scores=True, rule=None)
)
