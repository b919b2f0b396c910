"""The tabs of the studio: the `build(page)` of each module but page lays out one tab and ties its events."""
