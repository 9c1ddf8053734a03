"""Recordings: one schema for sound, pictures, bodies, touch and words with their times, and the importers into it."""
