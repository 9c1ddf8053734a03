"""Rounds on recordings: what they start from, how senses and streams are trained, and how they are evaluated."""
