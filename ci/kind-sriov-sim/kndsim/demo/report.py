"""The demo's verdict, as a table for people or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kndsim.demo.choice import Choice
from kndsim.demo.play import Result, Row


def problems(result: Result) -> list[str]:
    """Everything that is off; empty is success."""
    found = [
        f"{row.pod} {row.device} {row.direction} {row.traffic_class} {row.kind}: "
        f"sent {row.sent_bytes}, counted {row.counted_bytes}"
        for row in result.rows
        if not row.equal
    ]
    found += [
        f"{row.pod} {row.device} {row.direction} {row.traffic_class}: nothing was sent without the agent"
        for row in result.rows
        if row.kind != "rest" and row.sent_while_down <= 0
    ]
    if not result.rows:
        found.append("no traffic was counted")
    if result.agent_restarts != 1:
        found.append(f"the agent was restarted {result.agent_restarts} times, not once")
    return [*found, *result.device_changes, *result.slice_changes, *result.surprises]


def as_json(result: Result, choice: Choice) -> str:
    return json.dumps(
        {
            "backend": choice.backend,
            "backend_reason": choice.reason,
            "hook": result.hook,
            "agent_restarts": result.agent_restarts,
            "devices_home": not result.device_changes,
            "slices_back": not result.slice_changes,
            "rows": [
                {
                    "pod": row.pod,
                    "claim": row.claim,
                    "device": row.device,
                    "interface": row.interface,
                    "direction": row.direction,
                    "class": row.traffic_class,
                    "kind": row.kind,
                    "sent_bytes": row.sent_bytes,
                    "counted_bytes": row.counted_bytes,
                    "sent_while_down": row.sent_while_down,
                }
                for row in result.rows
            ],
            "problems": problems(result),
        }
    )


HEADINGS = (
    "POD",
    "CLAIM",
    "DEVICE",
    "INTERFACE",
    "DIRECTION",
    "CLASS",
    "KIND",
    "COUNTED",
    "SENT",
    "AGENT DOWN",
    "",
)


def as_table(result: Result) -> str:
    lines = [HEADINGS, *(_cells(row) for row in result.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    found = problems(result)
    home = "all devices home as before" if not result.device_changes else "devices are NOT as before"
    slices = "slices as before" if not result.slice_changes else "slices are NOT as before"
    text.append("")
    text.append(
        f"counted at {result.hook}; agent killed and started again: {result.agent_restarts}; {home}; {slices}"
    )
    text += [f"WRONG: {line}" for line in found]
    text.append(
        "OK: every byte that was sent was counted" if not found else f"FAILED: {len(found)} things are off"
    )
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.pod,
        row.claim,
        row.device,
        row.interface,
        row.direction,
        row.traffic_class,
        row.kind,
        str(row.counted_bytes),
        str(row.sent_bytes),
        str(row.sent_while_down),
        "equal" if row.equal else "NOT EQUAL",
    )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    numbers = range(7, 10)
    return [
        text.rjust(width) if column in numbers else text.ljust(width)
        for column, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
