"""Sources -> documents: what can be read, cut into parts, dropped, held out, repeated."""
