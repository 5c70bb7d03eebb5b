"""The node policy: whether what is written is what is in force."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from driver import running
from driver.doctor.model import Finding, Place, Subject, fail, ok
from driver.policy import PolicyFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """given: the file that was named on the command line. in_force: of the agent."""

    given: str = ""
    given_problem: str = ""
    agent_runs: bool = False
    agents_file: str = ""
    agents_problem: str = ""


def look(place: Place) -> Policy:
    agent = running.read(place.paths)
    return Policy(
        given=str(place.policy or ""),
        given_problem=PolicyFile(place.policy).problem,
        agent_runs=agent is not None,
        agents_file=agent.policy_file if agent else "",
        agents_problem=agent.policy_problem if agent else "",
    )


def judge(policy: Policy) -> Iterator[Finding]:
    mend = "mend the file; `knd validate FILE` shows every problem with its line"
    if policy.given_problem:
        yield fail("file", policy.given_problem, mend)
    elif policy.given:
        yield ok("file", f"{policy.given} is valid")
    if policy.agents_problem:
        yield fail("in-force", f"an older one, since {policy.agents_problem}", mend)
    elif policy.agents_file:
        yield ok("in-force", f"{policy.agents_file}, as the agent last read it")
    elif policy.agent_runs:
        yield ok("in-force", "the default one: the agent was given no file")
    elif not policy.given:
        yield ok("in-force", "no agent has told of one since the node was booted")


SUBJECT = Subject("policy", look, judge)
