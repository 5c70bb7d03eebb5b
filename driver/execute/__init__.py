"""Doing what a plan says, step by step, with undo. Runs in worker threads, never on the event loop."""
