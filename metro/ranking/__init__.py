"""Ranking the labels of one's own texts: `metro.rank`, `metro.Ranker`, `metro rank`."""
