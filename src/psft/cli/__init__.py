"""The commands, one module each: `HELP` (one line) and `run(argv) -> exit code`; heavy imports stay inside `run`."""
