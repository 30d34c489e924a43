"""The process: options, master and workers, threads, accept loops, policy loader, control socket.

    main           the program: command line, process mode, set-up, exit status
    options        the command line as one frozen value
    daemonise      leaving the terminal, telling the start command how it went
    privileges     user, group, root directory, limits
    logsetup       the log of a process

    master         one per instance: starts, watches and replaces workers
    slots          what it knows of them;  reloading, supervision, liveness: what it decides
    workers        the processes themselves: made, heard, told, ended
    control        the control sockets;  questions: to which workers they go
    revocation     ending the sessions that a newer policy refuses
    pidfile        locks and pid files
    channel        messages and descriptors between master and worker
    listeners      listening sockets: opened and kept by the master

    worker         one policy in one process: loads it, listens, serves, hands over, drains
    loader         from a policy file to a running policy, or to file:line and a remedy
    texts          what files that policy is made of;  borrowed: names that it forgot to import
    interpreter    what it may not do to the interpreter;  uncaught: what it does not catch
    needs          which capabilities it uses;  packetrules: handing its rules to kzorpd
    binding        from the policy's binds to sockets;  interfaces: those that come and go
    acceptor       accepting;  admission: how many;  threads: the pool that serves sessions
    answers        questions of the control socket;  stdio: what policies print
    judgement      what it would do with the sessions of an older policy;  consent: asking it

    check          --check-policy, --describe, --explain, each in a child (isolation)
    describe       what a policy wants from the packet filter;  rehearsal: config() without a client
    explain        what it does with a connection;  decision: what explain and judgement share

Timers, signals, the sinks of the log, lines over a Unix socket, capabilities and the service manager's
protocol lie in Zorp.process, where other programs use them too.  A policy never imports anything from here.
"""
