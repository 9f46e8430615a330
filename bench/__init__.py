"""Measures the project. Imports anything; nothing imports it."""

import logging

from ia3.cli.app import NOISE, is_news

for name in NOISE:  # before what makes it is imported
    logging.getLogger(name).addFilter(is_news)
