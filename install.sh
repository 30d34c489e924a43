#!/bin/sh
# make install, make uninstall: put the firewall into a system, or into DESTDIR for a package.
#
#   PREFIX/lib/zorp      the Python packages, ours and those that they need, apart from the system's own
#   PREFIX/sbin          links to the commands there
#   /etc, PREFIX/share   examples, man pages, units and what other programs look for
#
# What the administrator edits (files below /etc) is made when it is missing and never overwritten or
# removed.  Everything else is listed in PREFIX/lib/zorp/installed; uninstall removes what stands there.
set -eu

PREFIX=${PREFIX:-/usr}
DESTDIR=${DESTDIR:-}
PYTHON=${PYTHON:?the interpreter that has pip}
PIP_FLAGS=${PIP_FLAGS:-}
LIB=$PREFIX/lib/zorp
LIST=$DESTDIR$LIB/installed
COMMANDS="zorp zorpctl kzorp kzorpd kzorp-setup"

cd "$(dirname "$0")"

# put MODE FILE TARGET: a file that belongs to us; paths in it follow PREFIX
put() {
    mkdir -p "$DESTDIR$(dirname "$3")"
    sed "s,/usr/sbin/,$PREFIX/sbin/,g; s,^PATH=/usr/sbin:,PATH=$PREFIX/sbin:/usr/sbin:,; s,/usr/lib/nagios,$PREFIX/lib/nagios,g" \
        "$2" > "$DESTDIR$3.new"
    chmod "$1" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
    echo "$3" >> "$LIST.new"
}

# keep MODE FILE TARGET: a file that belongs to the administrator
keep() {
    if [ -e "$DESTDIR$3" ]; then
        echo "kept $3"
    else
        mkdir -p "$DESTDIR$(dirname "$3")"
        install -m "$1" "$2" "$DESTDIR$3"
    fi
}

# The packages are made beside the old ones and change places with them: a running daemon never sees half of them.
packages() {
    new=$DESTDIR$LIB.new
    rm -rf "$new" "$DESTDIR$LIB.old"
    mkdir -p "$new"
    copy=$(mktemp -d)                    # pip leaves its work where the sources are
    cp -R Zorp zorpctl pyproject.toml setup.py README.md LICENSE "$copy"
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-warn-script-location $PIP_FLAGS \
        --target "$new" "$copy" || { rm -rf "$copy" "$new"; exit 1; }
    rm -rf "$copy" "$new/bin"
    mkdir "$new/sbin"
    interpreter=$("$PYTHON" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)')
    for command in $COMMANDS; do
        { echo "#!$interpreter"; tail -n +2 "sbin/$command"; } > "$new/sbin/$command"
        chmod 755 "$new/sbin/$command"
    done
    if [ -e "$DESTDIR$LIB" ]; then mv "$DESTDIR$LIB" "$DESTDIR$LIB.old"; fi
    mv "$new" "$DESTDIR$LIB"
    rm -rf "$DESTDIR$LIB.old"
    mkdir -p "$DESTDIR$PREFIX/sbin"
    for command in $COMMANDS; do
        ln -sf "../lib/zorp/sbin/$command" "$DESTDIR$PREFIX/sbin/$command"
        echo "$PREFIX/sbin/$command" >> "$LIST.new"
    done
}

files() {
    for page in man/*.[58]; do put 644 "$page" "$PREFIX/share/man/man${page##*.}/${page#man/}"; done
    for text in README.md CHANGES.md doc/guide.md doc/attributes.md plugins/README.md systemd/README.md; do
        name=$(echo "$text" | sed 's,^doc/,,; s,/,-,')
        put 644 "$text" "$PREFIX/share/doc/zorp/$name"
    done
    for unit in systemd/*.service; do put 644 "$unit" "$PREFIX/lib/systemd/system/${unit#systemd/}"; done
    put 644 systemd/sysusers.d/zorp.conf "$PREFIX/lib/sysusers.d/zorp.conf"
    put 644 systemd/tmpfiles.d/zorp.conf "$PREFIX/lib/tmpfiles.d/zorp.conf"
    put 644 etc/zorpctl.bash "$PREFIX/share/bash-completion/completions/zorpctl"
    for plugin in plugins/munin/zorp_thread plugins/munin/zorp_mem_; do
        put 755 "$plugin" "$PREFIX/share/munin/plugins/${plugin##*/}"
    done
    put 755 plugins/nagios/check_zorp_threads.py "$PREFIX/lib/nagios/plugins/check_zorp_threads.py"
    put 755 init.d/zorp /etc/init.d/zorp

    keep 644 etc/logrotate.zorp /etc/logrotate.d/zorp
    keep 644 plugins/munin/munin_zorp.conf /etc/munin/plugin-conf.d/zorp
    keep 644 plugins/nagios/nrpe_zorp.cfg /etc/nagios/nrpe.d/zorp.cfg
    for example in etc/zorp/*; do keep 644 "$example" "/etc/zorp/${example##*/}"; done
    chmod 750 "$DESTDIR/etc/zorp"
}

case ${1:-} in
install)
    packages
    files
    mv "$LIST.new" "$LIST"
    echo "installed; the next steps are in $PREFIX/share/doc/zorp/README.md, 'From zero to a running instance'"
    ;;
uninstall)
    [ -e "$LIST" ] || { echo "nothing is installed below $DESTDIR$PREFIX" >&2; exit 1; }
    while read -r path; do rm -f "$DESTDIR$path"; done < "$LIST"
    rm -rf "${DESTDIR}${LIB:?}"
    rmdir "$DESTDIR$PREFIX/share/doc/zorp" 2>/dev/null || true
    echo "removed; /etc/zorp, /var/lib/zorp, the user zorp and other files below /etc stay"
    ;;
*)
    echo "usage: install.sh install|uninstall, see the Makefile" >&2
    exit 2
    ;;
esac
