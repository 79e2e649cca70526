"""Files: what is read and what is written. Parquet schemas, prompt shards, parts, the run manifest."""
