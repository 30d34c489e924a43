# bash completion for zorpctl(8)                                        -*- shell-script -*-

_zorpctl_commands='authorize check conns coredump deadlockcheck declog exec explain force-restart force-start force-stop
    gui-status help inclog log metrics reload reload-or-restart restart start status stop stop-session szig version'

# The names in instances.conf, and NAME#k of what runs.
_zorpctl_instances() {
    sed -n 's/^[[:space:]]*\([A-Za-z][A-Za-z0-9_.-]*\).*/\1/p' /etc/zorp/instances.conf 2>/dev/null
    local path
    for path in /run/zorp/zorp-*.pid; do
        [[ -e $path ]] || continue
        path=${path##*/zorp-}
        printf '%s\n' "${path%.pid}"
    done
}

_zorpctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} word command= options=
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:1:COMP_CWORD - 1}"; do
        if [[ " ${_zorpctl_commands//$'\n'/ } " == *" ${word#--} "* ]]; then
            command=${word#--}
            break
        fi
    done
    case $previous in
        -c|--config)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return ;;
        -s|--vset)
            mapfile -t COMPREPLY < <(compgen -W '0 1 2 3 4 5 6 7 8 9 10' -- "$current")
            return ;;
        -r|--root)
            mapfile -t COMPREPLY < <(compgen -W 'conns info service stats' -- "$current")
            return ;;
    esac
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$_zorpctl_commands -c --config -h --help" -- "$current")
        return
    fi
    case $command in
        status)        options='-v --verbose --json' ;;
        log)           options='-i --vinc -d --vdec -s --vset -S --log-spec' ;;
        szig)          options='-w --walk -r --root' ;;
        deadlockcheck) options='-e --enable -d --disable' ;;
        authorize)     options='-a --accept -r --reject -i --session -d --description' ;;
        stop-session)  options='-i --session' ;;
        metrics)       options='-l --listen' ;;
        conns|explain) options='--json' ;;
        reload)        options='--revoke' ;;
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options --help" -- "$current")
    elif [[ $current == @* ]]; then
        mapfile -t COMPREPLY < <(compgen -P @ -f -- "${current#@}")
    else
        mapfile -t COMPREPLY < <(compgen -W "$(_zorpctl_instances)" -- "$current")
    fi
}

complete -F _zorpctl zorpctl
