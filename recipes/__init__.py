"""How what is shipped was made; run from a checkout, not installed."""
