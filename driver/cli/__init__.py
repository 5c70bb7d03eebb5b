"""The `knd` command: one module per group of subcommands, one table for all of them.

Invariant: exit 0 fine, 1 failed, 2 wrong usage; an error is one sentence with what to do, and a
traceback only with --debug. All but `agent` and `cleanup` open the records read-only.
"""
