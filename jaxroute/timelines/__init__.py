"""One episode seen from inside: trace, picture, page."""
