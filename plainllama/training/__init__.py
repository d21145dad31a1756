"""One update and what surrounds it: engine, optimizer, where a run stands, what it logs."""
