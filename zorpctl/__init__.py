"""zorpctl: control of the instances on this host.

    zorpctl [-c CONF] COMMAND [OPTIONS] [INSTANCE ...]

    cli          command line -> command, exit status
    host         the files of this host: zorpctl.conf, instances.conf, directories, permissions
    processes    the processes of an instance: pid file, lock, signals
    szig         client of the control socket
    lifecycle    start, stop, restart, reload
    queries      status, statistics, log level, sessions
    report       one line per process, machine-readable forms

It knows the files and sockets that a daemon leaves on the host, never the policy language.
"""
