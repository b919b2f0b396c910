"""Serving one base to many people: a batch whose rows have adapters of their own, and HTTP."""
