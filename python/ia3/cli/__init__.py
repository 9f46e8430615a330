"""The command line: `app.py` declares the commands, and the steps behind them are modules of their own."""
