"""What each program that loads adapters accepts, as data: one file an engine, read when an engine is asked about."""
