"""What people read: one page that needs nothing else, and lines for the terminal.

`content.py` says what a report is made of; everything above it only reads that.
"""
