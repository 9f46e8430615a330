"""Measures the project. Imports anything; nothing imports it."""
