"""The subject-driven benchmark of the ETHER paper: methods × subjects × prompts × pictures."""
