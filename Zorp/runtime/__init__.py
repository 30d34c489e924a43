"""The process: options, master and workers, threads, accept loops, policy loader, control socket.

    main           the program: command line, process mode, set-up, exit status
    options        the command line as one frozen value
    daemonise      leaving the terminal, telling the start command how it went
    privileges     user, group, root directory, limits;  capabilities: what it works with
    check          --check-policy

    master         one per instance: starts, watches and replaces workers
    slots          what it knows of them;  reloading, supervision, liveness: what it decides
    control        the control sockets;  pidfile: locks and pid files
    channel        messages and descriptors between master and worker
    listeners      listening sockets: opened and kept by the master

    worker         one policy in one process: loads it, listens, serves, hands over, drains
    loader         from a policy file to a running policy, or to file:line and a remedy
    borrowed       names that a policy forgot to import
    binding        from the policy's binds to sockets;  interfaces: those that come and go
    acceptor       accepting;  admission: how many;  threads: the pool that serves sessions
    needs          which capabilities the policy uses
    answers        questions of the control socket;  stdio: what policies print

    logsetup       the log of a process; its sinks, timers, signals and the service manager's
                   protocol lie in Zorp.process, where other programs use them too

A policy never imports anything from here.
"""
