"""Running things: configuration, training runs, exact resume, EMA, signals, preflight."""
