"""The command `client review`: what a copy is, for a person to accept or not.

    mpunlearn client review copy --policy policy.toml --accept

It prints the family, the sizes and the chat template of a copy and everything that `client.plausibility` measures, and
with `--accept` writes them into the policy as the table [model]. From then on, a copy of another model is refused.

Not covered: whether the server's model is the one that it promised; nobody but the server can know that. The command has no
limits of memory and time, since a person watches it, and it opens none of the client's texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpunlearn.errors import PlanError
from mpunlearn.extras import needs
from mpunlearn.files import as_path, write_bytes

if TYPE_CHECKING:
    from mpunlearn.client.network.policy import Policy

MARGIN = 1.5
"""A later copy may predict the public text worse than the reviewed one by this many nats per token: the cost of noise."""
MAX_LENGTH = 512
"""Texts are cut to so many tokens."""
SHOWN = 1500
"""How many characters of the chat template are shown."""


@dataclass(frozen=True)
class Review:
    """What a copy is."""

    model: dict[str, Any]
    """Family, sizes and digests."""
    template: str
    """The chat template."""
    worst: dict[str, float]
    """The worst value that each check measured."""
    failed: dict[str, list[str]]
    """What is not plausible, by check."""
    public_nll: float | None
    """Negative log-likelihood of the public text, in nats per token."""
    written: str | None
    """The policy that the pins were written to."""

    def text(self) -> str:
        """A summary for the terminal."""
        from mpunlearn.progress import printable

        lines = [f"{name}: {value}" for name, value in self.model.items() if value is not None]
        lines += [
            "chat template:",
            *(f"    {printable(line)}" for line in self.template[:SHOWN].splitlines() or ["none"]),
        ]
        lines += [f"{name}: {value:.3g}" for name, value in self.worst.items()]
        lines += [f"NOT PLAUSIBLE: {reason}" for reasons in self.failed.values() for reason in reasons[:3]]
        last = (
            f"written to {self.written}"
            if self.written
            else "nothing was written; --accept writes [model] to the policy"
        )
        return "\n".join([*lines, last])

    def to_json(self) -> dict[str, Any]:
        """The review as JSON."""
        return dict(vars(self))


def review(
    copy: str | Path,
    *,
    policy: str | Path | None = None,
    invitation: str | Path | None = None,
    base: str | None = None,
    public_text: str | Path | None = None,
    accept: bool = False,
) -> Review:
    """Shows what a copy is, and pins the model in the policy if you accept it.

    Args:
        copy: The directory of a published copy.
        policy: The policy file. Its [plausibility] table gives the limits, and --accept writes [model] into it.
        invitation: The server's invitation.json, to create a policy that does not exist yet.
        base: The public model that the server's was trained from, a directory or hub:ORG/MODEL. The copy must have its
            shapes and its tokenizer, and the base's own tokenizer and template are used for training.
        public_text: A file of plain text, one text per line, to use instead of the sentences that the package contains.
        accept: Write [model] into the policy.

    Returns:
        What was found.

    Raises:
        PlanError: Options contradict each other, the base differs, or the copy is not plausible and --accept is given.
        MPUError: The copy cannot be read or loaded.
    """
    needs("client", "client review")
    from dataclasses import asdict, replace

    from mpunlearn.client.network import pins
    from mpunlearn.client.network.policy import Policy
    from mpunlearn.client.plausibility.examine import Texts, failures, measure
    from mpunlearn.client.plausibility.examine import public_text as public_text_of
    from mpunlearn.client.plausibility.report import Limits
    from mpunlearn.lm.records import Record

    folder, file = as_path(copy, "copy"), as_path(policy, "--policy") if policy is not None else None
    if accept and file is None:
        raise PlanError("--accept: needs --policy FILE to write to")
    if accept and file is not None and not file.exists() and invitation is None:
        raise PlanError(f"--policy {file}: does not exist; give --invitation to create it, which has the server's key")
    existing = Policy.read(file) if file is not None and file.exists() else None
    limits = existing.plausibility if existing is not None else Limits()
    if public_text is not None:
        limits = replace(limits, public_text=str(Path(public_text).absolute()))
    limits = replace(limits, public_nll=None)
    found = pins.Pins.of(folder)
    model = pins.ModelPolicy(**asdict(found), base=base)
    source = model.base_folder()
    if source is not None:
        if differences := pins.check_against_base(folder, source):
            raise PlanError(
                f"--base {base}: {'; '.join(differences)}; choose the model that the server's was trained from"
            )
        own = pins.Pins.of(source)
        model = replace(model, template=own.template, tokenizer=own.tokenizer)
    sentences = [record.answer for record in public_text_of(limits)]
    chats = [Record(question, answer) for question, answer in zip(sentences[::2], sentences[1::2], strict=False)]
    values = list(measure(folder, Texts(chats, []), limits, MAX_LENGTH, source))
    failed = failures(values, limits)
    least = ("rank", "finite", "verbatim")
    worst: dict[str, float] = {}
    for one in values:
        worse = min if one.check in least else max
        worst[one.check] = worse(worst.get(one.check, one.value), one.value)
    if accept and failed:
        raise PlanError(f"--accept: the copy is not plausible: {next(iter(failed.values()))[0]}; nothing was written")
    if accept and file is not None:
        limits = replace(limits, public_nll=round(worst["public_nll"] + MARGIN, 2))
        _write(file, existing, invitation, model, limits)
    template = pins.template_of(source or folder)
    return Review(asdict(model), template, worst, failed, worst.get("public_nll"), str(file) if accept else None)


def _write(file: Path, existing: "Policy | None", invitation: str | Path | None, model: Any, limits: Any) -> None:
    """Writes the pins into a policy, or a new policy."""
    from mpunlearn.client.network.policy_file import new_policy, with_tables
    from mpunlearn.protocol.flower.keys import read_invitation

    if existing is not None:
        text = with_tables(file.read_text(encoding="utf-8"), {"model": model, "plausibility": limits})
    else:
        invited = read_invitation(as_path(invitation, "--invitation"))
        text = new_policy(invited.server_key, model, limits)
    write_bytes(file, text.encode())
