"""Training on raw files without preparing them: read and encoded a little ahead, kept on a bounded piece of disk.

    raw files ─▶ linear: the source's token stream ─▶ chunks on disk ─▶ rows        (`builder`)  (`supply`, `rows`)

The rows are those of prepared shards of the same files and settings, byte for byte. Modules, from the bottom:

    linear     the order of a source's documents, epoch after epoch; it can stop and go on anywhere
    documents  one raw file -> its training documents as ids; `bad_lines` keeps what are none
    chunks     the format of a stretch of the stream on disk, with the stream's states at its ends
    plan       how much of each source is kept; what builders are told
    folder     who reads, who needs what, who builds
    builder    the process that makes chunks
    supply     waiting for chunks, and starting builders
    rows       the rows of the training stream
    held_out   held-out text, as much as evaluation asks for
    opening    from a recipe's data section to all of this
"""
