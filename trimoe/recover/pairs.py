"""Which of the original's layers and experts each of a finished folder's came from, by what trimoe.json says was decided."""

from __future__ import annotations

from dataclasses import dataclass

from trimoe.errors import UserError
from trimoe.model.decision import Decisions, LayerDecision, kept_layers, unchanged
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.output.record import Record


@dataclass(frozen=True)
class Pair:
    """Where a layer came from: the teacher's layer, and for each of the student's experts its number there."""

    teacher_layer: int
    keep: tuple[int, ...]


def pairs(record: Record | None, teacher: Skeleton, student: Skeleton) -> dict[int, Pair]:
    """The student's MoE layers by their own numbers. Without a record (trimoe.json) both must be of one shape. Raises UserError where the
    student cannot have been made from the teacher."""
    decisions = unchanged(teacher.sites) if record is None else _decisions(record, student)
    kept = kept_layers(teacher, decisions)
    if max(decisions) >= len(teacher.layers) or len(kept) != len(student.layers):
        raise _misfit(teacher, student, record, f"of its {len(teacher.layers)} layers {len(kept)} would be left, not {len(student.layers)}")
    out: dict[int, Pair] = {}
    for new, index in enumerate(kept):
        decision, site, own = decisions.get(index, LayerDecision()), teacher.sites.get(index), student.sites.get(new)
        reason = _difference(decision, site, own)
        if reason is not None:
            raise _misfit(teacher, student, record, f"layer {new} would be its layer {index}, but {reason}")
        if own is not None:
            out[new] = Pair(index, decision.keep)
    return out


def _difference(decision: LayerDecision, teacher: MoeBlock | None, student: MoeBlock | None) -> str | None:
    """Why the student's layer cannot be the teacher's; None where nothing speaks against it."""
    if teacher is None or student is None or decision.gone is not None:
        expected = teacher is not None and decision.gone is None
        return None if expected == (student is not None) else "only one of them has experts"
    if len(decision.keep) != student.num_experts or not all(0 <= expert < teacher.num_experts for expert in decision.keep):
        return f"has {student.num_experts} of {teacher.num_experts} experts where {len(decision.keep)} were kept"
    if (teacher.hidden, teacher.width) != (student.hidden, student.width):
        return f"its experts are {student.hidden} x {student.width}, not {teacher.hidden} x {teacher.width}"
    return None


def _decisions(record: Record, student: Skeleton) -> Decisions:
    try:
        decisions = record.decisions
        if not decisions or min(decisions) < 0 or any(type(expert) is not int for d in decisions.values() for expert in d.keep):
            raise ValueError
        return decisions
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{student.name}: trimoe.json does not say what was decided; the folder is damaged or was not made by trimoe."
        ) from None


def _misfit(teacher: Skeleton, student: Skeleton, record: Record | None, reason: str) -> UserError:
    if record is None:
        return UserError(
            f"{student.name} has no trimoe.json to say what it was made from, and {teacher.name} is not of its shape: {reason}."
        )
    return UserError(f"{student.name} was not made from {teacher.name}: {reason}.")
