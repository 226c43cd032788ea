"""How fast the data path is, each figure a ratio to something bare on the same machine in the same run.

    texts     real text to measure on: what lies on this machine, without repetitions
    fresh     a function in a process of its own, and what memory it took
    encode    preparing shards, against SentencePiece alone
    loader    rows for training, against copying them out of a memory map
"""
