"""What was measured, held against the claims of the ETHER paper, and what follows for a new run."""
