"""What has been decoded, run and read: of a request, of all requests of a decoder, or of an engine."""

from dataclasses import dataclass, field

STAGES = ("patcher", "encoder", "global", "decoder")
PATCH_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)
"""Upper bounds, in bytes, of the classes in which the lengths of patches are counted; one more class has the rest."""


@dataclass(slots=True)
class Counts:
    """Dictionaries are per stage; padding does not count. Of requests and decoders a prompt's prefill is left out.

    committed, drafted, accepted: bytes. patches: those that the committed ids begin, which is the number of global
    calls of plain BLT for the same text. calls: passes. seconds: a decoder's share, by rows, of the time of passes; not
    kept for a single request.
    """

    committed: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    patches: int = 0
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    bytes_read: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def decoder_calls(self) -> int:
        """The paper's decoder NFE."""
        return self.calls["decoder"]

    @property
    def global_calls(self) -> int:
        """The paper's encoder/global NFE."""
        return self.calls["global"]

    def add(self, other: "Counts") -> None:
        for name in ("committed", "rounds", "drafted", "accepted", "patches"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for stage in STAGES:
            self.calls[stage] += other.calls[stage]
            self.rows[stage] += other.rows[stage]
            self.bytes_read[stage] += other.bytes_read[stage]
            self.seconds[stage] += other.seconds[stage]
