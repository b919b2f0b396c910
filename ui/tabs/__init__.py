"""The tabs of the studio: each module's `build(studio)` lays out one tab and returns its TabParts."""
