# "Reverse proxy": clients talk to the firewall, which forwards mail to a server in a DMZ.  As
# printed, with the import that an excerpt leaves out, and a port that a test can listen on.
from Zorp.Core import *
from Zorp.Smtp import *

Zone("dmz", ["127.0.5.0/24"])
Zone("internet", ["0.0.0.0/0"])


def default_instance():
    Service(name="service_smtp_transparent_directed",
            proxy_class=SmtpProxy,
            router=DirectedRouter(dest_addr=SockAddrInet('127.16.20.254', $server_port)$more)
    )
    Rule(service='service_smtp_transparent_directed',
         dst_port=25,
         src_zone=('dmz', ),
         dst_subnet=('172.16.40.1', )
    )
