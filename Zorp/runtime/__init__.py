"""The process: options, master and workers, threads, accept loops, policy loader, control socket.

    main       the program: command line, process mode, exit status
    options    the command line as one frozen value
    master     one per instance: starts, watches and replaces workers; owns sockets and pid files
    worker     one policy in one process: loads it, listens, serves, drains
    channel    messages and descriptors between the two
    listeners  opening listening sockets (master) and accepting on them (worker)
    threads    the pool that serves sessions
    loader     from a policy file to a running policy, or to file:line and a remedy

A policy never imports anything from here.
"""
