"""Tables of labels: what the rows of a CSV, TSV or parquet file say."""
