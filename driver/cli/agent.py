"""`knd agent`: run the agent in the foreground until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os

from driver.settings import add_agent_arguments, settings_from


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("agent", help="run the node agent")
    add_agent_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    # Imported here so that the other commands do not wait for gRPC and the rest of the agent.
    from driver.app import App

    settings = settings_from(arguments, os.environ)
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )

    async def serve() -> None:
        await App(settings).run()

    asyncio.run(serve())
    return 0
