#!/bin/sh
# make install, make uninstall: put the firewall into a system, or into DESTDIR for a package.
#
#   PREFIX/lib/zorp      the Python packages, ours and those that they need, apart from the system's own
#   PREFIX/sbin          links to the commands there
#   PREFIX/share/munin, PREFIX/lib/nagios   links to the plugins there
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
PLUGINS="munin/zorp_thread munin/zorp_mem_ nagios/check_zorp_threads.py"

cd "$(dirname "$0")"

# place MODE FILE TARGET: write a file; paths in it follow PREFIX
place() {
    mkdir -p "$DESTDIR$(dirname "$3")"
    sed "s,/usr/sbin/,$PREFIX/sbin/,g; s,^PATH=/usr/sbin:,PATH=$PREFIX/sbin:/usr/sbin:,; s,/usr/lib/nagios,$PREFIX/lib/nagios,g" \
        "$2" > "$DESTDIR$3.new"
    chmod "$1" "$DESTDIR$3.new"
    mv -f "$DESTDIR$3.new" "$DESTDIR$3"
}

# put MODE FILE TARGET: a file that belongs to us
put() {
    place "$1" "$2" "$3"
    echo "$3" >> "$LIST.new"
}

# keep MODE FILE TARGET: a file that belongs to the administrator
keep() {
    if [ -e "$DESTDIR$3" ]; then
        echo "kept $3"
    else
        place "$1" "$2" "$3"
    fi
}

# link TARGET PATH: a link that belongs to us
link() {
    mkdir -p "$DESTDIR$(dirname "$2")"
    ln -sf "$1" "$DESTDIR$2"
    echo "$2" >> "$LIST.new"
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
        --target "$new" "$copy[metrics]" || { rm -rf "$copy" "$new"; exit 1; }
    rm -rf "$copy" "$new/bin"
    mkdir "$new/sbin" "$new/plugins" "$new/plugins/munin" "$new/plugins/nagios"
    interpreter=$("$PYTHON" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)')
    programs=$(printf 'sbin/%s ' $COMMANDS; printf 'plugins/%s ' $PLUGINS)
    for program in $programs; do
        { echo "#!$interpreter"; tail -n +2 "$program"; } > "$new/$program"
        chmod 755 "$new/$program"
    done
    if [ -e "$DESTDIR$LIB" ]; then mv "$DESTDIR$LIB" "$DESTDIR$LIB.old"; fi
    mv "$new" "$DESTDIR$LIB"
    rm -rf "$DESTDIR$LIB.old"
    for command in $COMMANDS; do link "../lib/zorp/sbin/$command" "$PREFIX/sbin/$command"; done
    for plugin in $PLUGINS; do
        case $plugin in
        munin/*) link "../../../lib/zorp/plugins/$plugin" "$PREFIX/share/munin/plugins/${plugin##*/}" ;;
        nagios/*) link "../../zorp/plugins/$plugin" "$PREFIX/lib/nagios/plugins/${plugin##*/}" ;;
        esac
    done
}

files() {
    for page in man/*.[58]; do put 644 "$page" "$PREFIX/share/man/man${page##*.}/${page#man/}"; done
    for text in README.md CHANGES.md doc/guide.md doc/attributes.md doc/options.md doc/reference.md plugins/README.md systemd/README.md; do
        name=$(echo "$text" | sed 's,^doc/,,; s,/,-,')
        put 644 "$text" "$PREFIX/share/doc/zorp/$name"
    done
    for unit in systemd/*.service; do put 644 "$unit" "$PREFIX/lib/systemd/system/${unit#systemd/}"; done
    put 644 systemd/sysusers.d/zorp.conf "$PREFIX/lib/sysusers.d/zorp.conf"
    put 644 systemd/tmpfiles.d/zorp.conf "$PREFIX/lib/tmpfiles.d/zorp.conf"
    put 644 etc/zorpctl.bash "$PREFIX/share/bash-completion/completions/zorpctl"
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
    echo "removed; /etc/zorp, /var/lib/zorp, /var/lib/kzorp, the user zorp and other files below /etc stay"
    ;;
*)
    echo "usage: install.sh install|uninstall, see the Makefile" >&2
    exit 2
    ;;
esac
