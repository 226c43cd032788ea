"""From raw corpora to the rows a training step reads. Nothing here knows torch, DeepSpeed or the model.

    raw files    RedPajama, Dolma, the Pile: JSON lines, plain, gzip or zstandard, parquet; local or behind a URL
      | readers      a line becomes exactly one `Document`, `BadLine` or `PassedOver`
    documents    text, source label, id
      | tokenizer    token ids, through an exact word cache; the end-of-document id follows each document
    shards       tokens and document ends on disk, checksummed; with the manifest they are a shard set
      | stages, mixture   which source the next row comes from: exact shares at every prefix
      | order        which row of that source: files and rows shuffled by keyed permutations
      | packing      rows of seq_len + 1 tokens out of the source's endless stream
    rows         a pure function of (config, index): no state, any number of ranks, O(1) resume
      | loader       the micro batches of one rank, prefetched; its state is a step number
    batches

`spool` makes the same rows from raw files while training goes on, and `feed` opens either. `document` and `config`
hold the nouns, `sample` writes small corpora to try it all on, and the command line (`moepp-data`, or
`python -m data_pipeline`) builds, proves, shows and measures.
"""
