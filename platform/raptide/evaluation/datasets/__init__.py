"""What tasks are asked over, read and checked.

A module for each sort of data; the files are Parquet or CSV, with the columns that it documents.
"""
