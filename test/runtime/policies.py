"""Policies for tests of the process: they need no proxy, so that these tests show what the process does.

ECHO greets every client with `$word`, then sends back what it gets until the client is done.
"""

ECHO = '''
import os, threading

from Zorp import Globals
from Zorp.acceptance.binds import DBSockAddr
from Zorp.Constants import ZD_PROTO_TCP
from Zorp.acceptance.dispatch_table import Dispatch
from Zorp.acceptance.instance_numbers import getInstanceId
from Zorp.SockAddr import SockAddrInet
from Zorp.Zorp import *

word = "$word"

def serve(stream, session_id):
    stream.send(("%s %s %d\\n" % (word, session_id, os.getpid())).encode())
    while True:
        data = stream.recv()
        if not data:
            break
        if data == b"quit\\n":
            quit(7)
        elif data == b"exit\\n":
            os._exit(3)
        elif data == b"print\\n":
            print("printed by the policy")
        elif data == b"freeze\\n":
            import ctypes
            ctypes.PyDLL(None).sleep(3600)          # holds the interpreter
        elif data == b"nested\\n":
            done = threading.Event()
            started = Globals.threads.start("nested", done.set)
            stream.send(b"started\\n" if started and done.wait(5) else b"refused\\n")
            continue
        stream.send(data)
    stream.close()

def accepted(stream, client, local, listen):
    session_id = "svc/%s/echo:%d" % (Globals.virtual_instance_name, getInstanceId("echo"))
    return Globals.threads.start(session_id, lambda: serve(stream, session_id))

def init(names, virtual_name, is_master):
    Globals.virtual_instance_name = virtual_name
    Globals.instance_name = names[0]
    for port in ($ports,):
        Dispatch("%s/dsp/dispatch:0" % names[0], DBSockAddr(SockAddrInet("127.0.0.1", port), ZD_PROTO_TCP), 100,
                 accepted)
    return TRUE
'''
