/* The constant engine: what stands behind each peer, and costs far less than any of them.

   One thread, one epoll, HTTP/1.1 with keep-alive, 127.0.0.1 on a port that it prints. A POST gets the same answer each
   time; one with "stream":true gets EVENTS events as fast as they go, or, with `pace=40 events=400` somewhere in its body
   (a prompt comes through a peer unchanged), so many a second and so many in all. The text of a paced event holds
   T<when it was due>T<when it was written>T, in nanoseconds of CLOCK_MONOTONIC: text survives a peer that writes events
   anew.
   An engine's answer has an engine's members (usage above all: a peer that misses it counts tokens itself).

   It is FastChat's worker too, by path; registering it with the controller is left to whoever started it. There a
   stream is JSON ended by NULs, each with the whole text so far: so FastChat wants it.

   It ends with the process that started it. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER = 364, EVENT = 180, EVENTS = 200, DELTA = 34, REQUEST = 1 << 16, DESCRIPTORS = 1 << 16 };

typedef struct {
    char *data;
    size_t size, room;
} Text;

typedef struct {
    int fd, writing;
    size_t have;
    const char *out; /* one of the constant answers, or `event` */
    size_t left;
    char event[1024];
    long paced, due, interval; /* events still to come; when the next is due and how far apart they are, in ns */
    char in[REQUEST];
} Connection;

static const char stream_head[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
static Text answer, stream, worker_answer, worker_stream, worker_status, context, count, conversation;
static Connection *connections[DESCRIPTORS];
static int poller;

static long now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000L + at.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void add(Text *text, const char *form, ...) {
    va_list arguments, again;
    va_start(arguments, form);
    va_copy(again, arguments);
    size_t more = (size_t)vsnprintf(NULL, 0, form, again);
    va_end(again);
    if (text->size + more + 1 > text->room) {
        text->room = 2 * (text->size + more + 1);
        if (!(text->data = realloc(text->data, text->room))) fail("realloc");
    }
    vsnprintf(text->data + text->size, more + 1, form, arguments);
    va_end(arguments);
    text->size += more;
}

static const char *fill(size_t size) {
    static char letters[EVENTS * DELTA + 1];
    memset(letters, 'y', size);
    letters[size] = 0;
    return letters;
}

/* An event of EVENT bytes, as a chunk of HTTP. No two are alike: LiteLLM ends a stream that repeats itself. */
static void add_event(Text *text, long due, long at) {
    const char *form = "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"model\":\"bench\",\"choices\":"
                       "[{\"index\":0,\"delta\":{\"content\":\"T%018ldT%018ldT%s\"},\"finish_reason\":null}]}\n\n";
    size_t bare = (size_t)snprintf(NULL, 0, form, due, at, "");
    add(text, "%x\r\n", EVENT);
    add(text, form, due, at, fill(EVENT - bare));
    add(text, "\r\n");
}

static void add_end(Text *text) {
    const char *end = "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"model\":\"bench\",\"choices\":"
                      "[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    add(text, "%zx\r\n%s\r\n0\r\n\r\n", strlen(end), end);
}

static void set_json(Text *text, const char *body) {
    add(text, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
}

static void set_answers(void) {
    const char *form = "{\"id\":\"c\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"bench\",\"choices\":[{\"index\":0,"
                       "\"message\":{\"role\":\"assistant\",\"content\":\"%s\"},\"finish_reason\":\"stop\"}],"
                       "\"usage\":{\"prompt_tokens\":90,\"completion_tokens\":90,\"total_tokens\":180}}";
    Text body = {0}, part = {0};
    add(&body, form, fill(ANSWER - (strlen(form) - 2)));
    set_json(&answer, body.data);
    body.size = 0;
    add(&body, "{\"text\":\"%s\",\"error_code\":0,\"usage\":{\"prompt_tokens\":90,\"completion_tokens\":90,\"total_tokens\":180},"
               "\"finish_reason\":\"stop\"}", fill(200));
    set_json(&worker_answer, body.data);
    add(&stream, "%s", stream_head);
    add(&worker_stream, "%s", stream_head);
    for (int at = 0; at < EVENTS; at++) {
        add_event(&stream, at, at);
        part.size = 0;
        add(&part, "{\"text\":\"%s\",\"error_code\":0,\"usage\":{\"prompt_tokens\":90,\"completion_tokens\":%d,"
                   "\"total_tokens\":%d},\"finish_reason\":%s}",
            fill((size_t)(at + 1) * DELTA), at, 90 + at, at + 1 < EVENTS ? "null" : "\"stop\"");
        add(&worker_stream, "%zx\r\n%s%c\r\n", part.size + 1, part.data, 0);
    }
    add_end(&stream);
    add(&worker_stream, "0\r\n\r\n");
    set_json(&worker_status, "{\"model_names\":[\"bench\"],\"speed\":1,\"queue_length\":0}");
    set_json(&context, "{\"context_length\":32768}");
    set_json(&count, "{\"count\":90,\"error_code\":0}");
    set_json(&conversation, "{\"conv\":{\"name\":\"bench\",\"system_template\":\"{system_message}\",\"system_message\":\"\","
                            "\"roles\":[\"USER\",\"ASSISTANT\"],\"messages\":[],\"offset\":0,\"sep_style\":1,\"sep\":\"\\n\","
                            "\"sep2\":null,\"stop_str\":null,\"stop_token_ids\":null}}");
    free(body.data);
    free(part.data);
}

static void end(Connection *connection) {
    connections[connection->fd] = NULL;
    close(connection->fd);
    free(connection);
}

static void watch(Connection *connection, int writing) {
    if (connection->writing == writing) return;
    connection->writing = writing;
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.fd = connection->fd};
    epoll_ctl(poller, EPOLL_CTL_MOD, connection->fd, &event);
}

/* Write what is left. Returns -1 when the connection is over. */
static int flush(Connection *connection) {
    while (connection->left) {
        ssize_t sent = send(connection->fd, connection->out, connection->left, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) break;
        if (sent < 0) return -1;
        connection->out += sent;
        connection->left -= (size_t)sent;
    }
    watch(connection, connection->left > 0);
    return 0;
}

static int put(Connection *connection, const Text *text) {
    connection->out = text->data;
    connection->left = text->size;
    return flush(connection);
}

/* The paced events that are due. Those that a full socket holds back are written, and stamped, when it takes them. */
static int put_due(Connection *connection) {
    static Text text;
    while (connection->paced && !connection->left && connection->due <= now()) {
        text.size = 0;
        add_event(&text, connection->due, now());
        if (!--connection->paced) add_end(&text);
        memcpy(connection->event, text.data, text.size);
        connection->out = connection->event;
        connection->left = text.size;
        connection->due += connection->interval;
        if (flush(connection) < 0) return -1;
    }
    return 0;
}

static long number_after(const char *body, const char *word, long otherwise) {
    const char *at = strstr(body, word);
    return at ? strtol(at + strlen(word), NULL, 10) : otherwise;
}

static int respond(Connection *connection, const char *head, const char *body) {
    const char *path = strchr(head, ' ') + 1;
    if (!strncmp(path, "/worker_generate_stream ", 24)) return put(connection, &worker_stream);
    if (!strncmp(path, "/worker_generate ", 17)) return put(connection, &worker_answer);
    if (!strncmp(path, "/worker_get_status ", 19)) return put(connection, &worker_status);
    if (!strncmp(path, "/worker_get_conv_template ", 26)) return put(connection, &conversation);
    if (!strncmp(path, "/model_details ", 15)) return put(connection, &context);
    if (!strncmp(path, "/count_token ", 13)) return put(connection, &count);
    if (!strstr(body, "\"stream\":true") && !strstr(body, "\"stream\": true")) return put(connection, &answer);
    long pace = number_after(body, "pace=", 0);
    if (pace <= 0) return put(connection, &stream);
    connection->paced = number_after(body, "events=", EVENTS);
    connection->interval = 1000000000L / pace;
    /* Engines do not march in step: each stream has a phase of its own. */
    static long begun;
    connection->due = now() + (long)(0.61803399 * (double)begun++ * (double)connection->interval) % connection->interval;
    connection->out = stream_head;
    connection->left = strlen(stream_head);
    return flush(connection);
}

/* Answer the requests that are whole, one after another. */
static int take(Connection *connection) {
    while (connection->have && !connection->left && !connection->paced) {
        connection->in[connection->have] = 0;
        char *body = strstr(connection->in, "\r\n\r\n");
        if (!body) return 0;
        *body = 0;
        body += 4;
        const char *length = strcasestr(connection->in, "\r\ncontent-length:");
        size_t size = length ? strtoul(length + 17, NULL, 10) : 0;
        size_t whole = (size_t)(body - connection->in) + size;
        if (!strchr(connection->in, ' ') || strcasestr(connection->in, "\r\ntransfer-encoding:") || whole >= REQUEST) return -1;
        if (whole > connection->have) {
            body[-4] = '\r';
            return 0;
        }
        char next = body[size];
        body[size] = 0;
        if (respond(connection, connection->in, body) < 0) return -1;
        body[size] = next;
        connection->have -= whole;
        memmove(connection->in, connection->in + whole, connection->have);
    }
    return 0;
}

static int receive(Connection *connection) {
    ssize_t got = recv(connection->fd, connection->in + connection->have, REQUEST - 1 - connection->have, 0);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    connection->have += (size_t)got;
    return take(connection);
}

static void accept_all(int listening) {
    int fd, on = 1;
    while ((fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        Connection *connection = fd < DESCRIPTORS ? malloc(sizeof *connection) : NULL;
        if (!connection) fail("too many connections");
        memset(connection, 0, offsetof(Connection, in));
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        connection->fd = fd;
        connections[fd] = connection;
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
    }
}

/* Write what is due. Returns the nanoseconds until more is, or -1. */
static long run_paced(int highest) {
    long next = -1;
    for (int fd = 0; fd <= highest; fd++) {
        Connection *connection = connections[fd];
        if (!connection || !connection->paced || connection->left) continue;
        if (put_due(connection) < 0 || (!connection->paced && take(connection) < 0)) {
            end(connection);
        } else if (connection->paced && !connection->left) {
            long wait = connection->due - now();
            if (next < 0 || wait < next) next = wait < 0 ? 0 : wait;
        }
    }
    return next;
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct epoll_event events[256], accepting = {.events = EPOLLIN, .data.fd = listening};

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    set_answers();
    if (bind(listening, (struct sockaddr *)&address, size) < 0 || listen(listening, 4096) < 0) fail("bind");
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listening, &accepting) < 0) fail("epoll");
    getsockname(listening, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    for (int highest = 0;;) {
        long wait = run_paced(highest);
        struct timespec timeout = {wait / 1000000000L, wait % 1000000000L};
        int ready = epoll_pwait2(poller, events, 256, wait < 0 ? NULL : &timeout, NULL);
        if (ready < 0 && errno != EINTR) fail("epoll_pwait2");
        for (int at = 0; at < ready; at++) {
            int fd = events[at].data.fd;
            if (fd == listening) {
                accept_all(listening);
                continue;
            }
            Connection *connection = connections[fd];
            if (fd > highest) highest = fd;
            if (((events[at].events & EPOLLOUT) && (flush(connection) < 0 || take(connection) < 0)) ||
                ((events[at].events & ~(uint32_t)EPOLLOUT) && receive(connection) < 0))
                end(connection);
        }
    }
}
