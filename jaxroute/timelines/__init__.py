"""Detailed views of one episode: trace, picture, page."""
