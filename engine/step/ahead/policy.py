"""When the host launches work before it has read earlier results: a setting for operators, tests and measurements."""

from dataclasses import dataclass

from ...config import Policy


@dataclass(frozen=True, slots=True)
class RunAhead:
    """A policy for each kind of work, see `engine.step.ahead`.

    bytes: further bytes of blt after a step. next_step: patcher and encoder of the next step of blt. drafts: all passes
    of a draft in one launch, and its verification. blocks: passes over a block.
    """

    bytes: Policy = "measured"
    next_step: Policy = "measured"
    drafts: Policy = "measured"
    blocks: Policy = "measured"

    @classmethod
    def everywhere(cls, policy: Policy) -> "RunAhead":
        return cls(policy, policy, policy, policy)
