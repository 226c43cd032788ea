"""From raw corpora to the rows a training step reads. Nothing here knows torch, DeepSpeed or the model.

    raw files    RedPajama, Dolma, the Pile: JSON lines, plain or under gzip or zstandard
      | readers      a line becomes exactly one `Document`, or one `BadLine` for the quarantine
    documents    text, source label, id
      | tokenizer    token ids; the end-of-document id follows each document
    shards       tokens and document ends on disk, checksummed; with the manifest they are a shard set
      | mixture      which source the next row comes from: exact shares at every prefix
      | stages       mixtures one after another, and sources that may give only so many epochs
      | order        which row of that source: files and rows shuffled by keyed permutations
      | packing      rows of seq_len + 1 tokens out of the source's endless stream
    rows         a pure function of (config, index): no state, any number of ranks, O(1) resume
      | loader       the micro batches of one rank, prefetched; its state is a step number
    batches

`document` and `config` hold the nouns, `sample` writes small corpora to try it all on, and the command line
(`moepp-data`, or `python -m data_pipeline`) builds, verifies and shows shard sets.
"""
