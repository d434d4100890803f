/* Many callers at one instant: each has a connection, sends one request on it, and waits for its answer.
 *
 *   burst --port P --connections N --request FILE [--limit S]
 *
 * One thread, one epoll. It opens the connections and says {"open": N} once all have been accepted; at a line on stdin it
 * sends the request on each of them and says {"sent": NS}; when every answer has been read to its end it says when the first
 * and the last were, how many had which status, and how many bytes they had in all, and ends. All times are ns of
 * CLOCK_MONOTONIC. An answer has a Content-Length, and its body's bytes are counted, not looked at. Anything else, and the
 * limit of time, ends it with a word on stderr.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST_CALLERS = 19000, HEAD_BYTES = 2048, READ_BYTES = 65536, MOST_EVENTS = 512 };
/* So many connections are opened at a time, and the server has accepted all of them before the next ones are: of a full
 * queue the kernel drops whom it has told that he is connected, and resets him later. */
enum { OPENED_AT_A_TIME = 500 };

typedef struct {
    int fd;
    bool is_open, is_done;
    int status;
    size_t head_bytes, body_left; /* the latter once there is a status */
    char *head;
} Caller;

static Caller *callers;
static int poller, caller_count, open_count, done_count, statuses[600];
static char *request, scratch[READ_BYTES];
static size_t request_bytes, bytes_read;
static uint64_t sent_ns, first_ns, last_ns;

static void die(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    fputs("burst: ", stderr);
    vfprintf(stderr, format, rest);
    fputc('\n', stderr);
    va_end(rest);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void *must(void *memory) {
    if (memory == NULL)
        die("out of memory");
    return memory;
}

static void open_caller(Caller *caller, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    caller->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (caller->fd < 0)
        die("no socket: %s", strerror(errno));
    int yes = 1;
    setsockopt(caller->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    /* Its end is a reset: ten thousand ports in TIME_WAIT would be missed by the next round. */
    struct linger none = {.l_onoff = 1, .l_linger = 0};
    setsockopt(caller->fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
    if (connect(caller->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        die("cannot connect: %s", strerror(errno));
    struct epoll_event what = {.events = EPOLLOUT, .data.ptr = caller};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, caller->fd, &what) < 0)
        die("epoll: %s", strerror(errno));
}

static void is_open(Caller *caller) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(caller->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error)
        die("cannot connect: %s", strerror(error));
    caller->is_open = true;
    open_count++;
    struct epoll_event what = {.events = EPOLLIN, .data.ptr = caller};
    epoll_ctl(poller, EPOLL_CTL_MOD, caller->fd, &what);
}

static void take_head(Caller *caller) {
    if (sscanf(caller->head, "HTTP/1.1 %d", &caller->status) != 1 || caller->status < 200 || caller->status > 599)
        die("no answer: %.60s", caller->head);
    const char *length = strcasestr(caller->head, "\r\ncontent-length:");
    if (length == NULL)
        die("an answer without its length: %.60s", caller->head);
    caller->body_left = strtoul(length + 17, NULL, 10);
}

static void read_answer(Caller *caller) {
    ssize_t count = read(caller->fd, scratch, sizeof scratch);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0)
        die("a connection ended %s its answer, %.1f s after the first request, with %d of %d answered: %s",
            caller->is_done ? "behind" : "before", (double)(now_ns() - sent_ns) / 1e9,
            done_count, caller_count, count < 0 ? strerror(errno) : "closed");
    if (caller->is_done)
        die("something came behind an answer");
    bytes_read += (size_t)count;
    const char *from = scratch;
    size_t left = (size_t)count;
    if (caller->status == 0) {
        if (caller->head == NULL)
            caller->head = must(calloc(1, HEAD_BYTES + 1));
        size_t room = HEAD_BYTES - caller->head_bytes, taken = left < room ? left : room;
        memcpy(caller->head + caller->head_bytes, from, taken);
        caller->head[caller->head_bytes + taken] = 0;
        const char *end = strstr(caller->head, "\r\n\r\n");
        if (end == NULL) {
            if (taken < left || taken == room)
                die("an answer's head is too long");
            caller->head_bytes += taken;
            return;
        }
        size_t head = (size_t)(end - caller->head) + 4 - caller->head_bytes;
        left -= head;
        take_head(caller);
        free(caller->head);
        caller->head = NULL;
    }
    if (left > caller->body_left)
        die("an answer is longer than it said");
    caller->body_left -= left;
    if (caller->body_left)
        return;
    caller->is_done = true;
    statuses[caller->status]++;
    last_ns = now_ns();
    if (done_count++ == 0)
        first_ns = last_ns;
}

static void wait_events(void) {
    static struct epoll_event events[MOST_EVENTS];
    int count = epoll_wait(poller, events, MOST_EVENTS, -1);
    if (count < 0 && errno != EINTR)
        die("epoll: %s", strerror(errno));
    for (int at = 0; at < count; at++) {
        Caller *caller = events[at].data.ptr;
        if (!caller->is_open)
            is_open(caller);
        else
            read_answer(caller);
    }
}

/* How many have connected whom the server has not accepted yet, as the kernel tells: listeners come first in its list. */
static unsigned long queued_at(int port) {
    static char text[READ_BYTES + 1];
    FILE *file = fopen("/proc/net/tcp", "r");
    if (file == NULL)
        die("cannot read /proc/net/tcp");
    text[fread(text, 1, READ_BYTES, file)] = 0;
    fclose(file);
    unsigned long queued = 0;
    for (char *line = strchr(text, '\n'); line != NULL; line = strchr(line + 1, '\n')) {
        unsigned listens_at, state;
        unsigned long length;
        if (sscanf(line + 1, " %*d: %*8x:%x %*8x:%*x %x %*x:%lx", &listens_at, &state, &length) == 3 && state == 10 &&
            listens_at == (unsigned)port)
            queued += length;
    }
    return queued;
}

static void read_request(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        die("cannot read %s", path);
    request = must(malloc(65536));
    request_bytes = fread(request, 1, 65536, file);
    fclose(file);
}

int main(int count, char **words) {
    int port = 0;
    unsigned limit_s = 60;
    for (int at = 1; at + 1 < count; at += 2) {
        const char *name = words[at], *value = words[at + 1];
        if (strcmp(name, "--port") == 0)
            port = atoi(value);
        else if (strcmp(name, "--connections") == 0)
            caller_count = atoi(value);
        else if (strcmp(name, "--request") == 0)
            read_request(value);
        else if (strcmp(name, "--limit") == 0)
            limit_s = (unsigned)atoi(value);
        else
            die("unknown option %s", name);
    }
    if (port == 0 || request_bytes == 0 || caller_count < 1 || caller_count > MOST_CALLERS)
        die("wants --port, --request and --connections between 1 and %d", MOST_CALLERS);
    alarm(limit_s); /* whatever hangs ends with a signal */
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    callers = must(calloc((size_t)caller_count, sizeof *callers));
    for (int begun = 0; begun < caller_count;) {
        for (int more = 0; more < OPENED_AT_A_TIME && begun < caller_count; more++)
            open_caller(&callers[begun++], port);
        while (open_count < begun)
            wait_events();
        while (queued_at(port))
            usleep(2000);
    }
    printf("{\"open\": %d}\n", open_count);
    fflush(stdout);
    char line[16];
    if (fgets(line, sizeof line, stdin) == NULL)
        return 0;
    sent_ns = now_ns();
    for (int at = 0; at < caller_count; at++)
        if (write(callers[at].fd, request, request_bytes) != (ssize_t)request_bytes)
            die("cannot send: %s", strerror(errno));
    printf("{\"sent\": %llu}\n", (unsigned long long)sent_ns);
    fflush(stdout);
    while (done_count < caller_count)
        wait_events();
    printf("{\"first\": %llu, \"last\": %llu, \"bytes\": %zu, \"statuses\": {", (unsigned long long)first_ns,
           (unsigned long long)last_ns, bytes_read);
    const char *separator = "";
    for (int status = 200; status < 600; status++)
        if (statuses[status]) {
            printf("%s\"%d\": %d", separator, status, statuses[status]);
            separator = ", ";
        }
    puts("}}");
    return 0;
}
