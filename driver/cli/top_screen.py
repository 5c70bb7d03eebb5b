"""The screen of `knd top`.

Invariant: reading happens in a thread, so that a slow agent stops no key; an agent that is away is said in
the status line and asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static

from driver.cli.output import printable
from driver.cli.rates import Order, Rates, Reading, View, cells, columns, sums, with_unit
from driver.cli.scrape import AgentSilent


class TopScreen(App[None]):
    """Rates by pod, device or class, read again every interval seconds."""

    ENABLE_COMMAND_PALETTE = False
    CSS = "#said { height: 1; } DataTable { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "view('pod')", "pods"),
        Binding("d", "view('device')", "devices"),
        Binding("c", "view('class')", "classes"),
        Binding("t", "order('total')", "sort: total"),
        Binding("e", "order('egress')", "egress"),
        Binding("i", "order('ingress')", "ingress"),
        Binding("n", "order('name')", "name"),
        Binding("space", "hold", "hold"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, read: Callable[[], Reading], interval: float, view: View, order: Order) -> None:
        super().__init__()
        self._read = read
        self._interval = interval
        self._shown = view
        self._order = order
        self._rates = Rates()
        self._held = False

    def compose(self) -> ComposeResult:
        yield Static("reading...", id="said", markup=False)
        yield DataTable(id="rates", cursor_type="row", zebra_stripes=True)
        yield Footer()

    def on_mount(self) -> None:
        self.set_interval(self._interval, self._ask)
        self._ask()

    def _ask(self) -> None:
        if not self._held:
            self.run_worker(self._look, thread=True, exclusive=True, exit_on_error=False)

    def _look(self) -> None:
        try:
            reading = self._read()
        except AgentSilent as silent:
            self.call_from_thread(self._say, str(silent))
            return
        self.call_from_thread(self._take, reading)

    def _take(self, reading: Reading) -> None:
        self._rates.feed(reading)
        self._draw()

    def _say(self, text: str) -> None:
        self.query_one("#said", Static).update(printable(text))

    def _draw(self) -> None:
        rows = self._rates.rows(self._shown, self._order)
        table = self.query_one("#rates", DataTable)
        place = table.cursor_coordinate
        table.clear(columns=True)
        table.add_columns(*columns(self._shown), "source", "egress", "ingress", "packets", "last readings")
        for rate in rows:
            # Text, not markup: a pod's name must not be read as a style.
            table.add_row(*[Text(printable(cell)) for cell in [*rate.names, *cells(rate)]])
        if rows:
            table.move_cursor(row=min(place.row, len(rows) - 1))
        total = ", ".join(
            f"{source}: {with_unit(egress, 'b/s')} out, {with_unit(ingress, 'b/s')} in"
            for source, (egress, ingress) in sorted(sums(rows).items())
        )
        held = "held; " if self._held else ""
        self._say(f"{held}by {self._shown}, sorted by {self._order}. {total or 'nothing was counted yet'}")

    def action_view(self, view: str) -> None:
        self._shown = View(view)
        self._draw()

    def action_order(self, order: str) -> None:
        self._order = Order(order)
        self._draw()

    def action_hold(self) -> None:
        self._held = not self._held
        self._draw()
