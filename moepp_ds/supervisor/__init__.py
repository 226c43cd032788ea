"""Look after a node's ranks: start them, stop them cleanly, say how they ended, start them again.

    processes   what lives in the session of a job, and how what has ended did
    job         one start of the `deepspeed` launcher, until its last process is gone
    verdict     how a job ended, in words, and whether another start may help
    hosts       which hosts there are, and which of them this one is
    attempt     the files by which hosts agree on one attempt
    roll        who takes part in an attempt of several hosts, agreed through the run folder
    restarts    attempt after attempt, until the run is complete, stopped or given up

Neither torch nor deepspeed is imported here.
"""
