/* Load generator and publisher in one small program, which cost much less than what they measure.
 *
 * One thread, one epoll, HTTP/1.1 by hand. What it talks to is ours or the floor's, on this machine: it understands
 * answers with a Content-Length or chunked ones, and stops with a word on stderr at anything else, at any status but a
 * 2xx, and when a run takes longer than it can.
 *
 *   load MODE --port P [--connections N] [--seconds S] --request FILE... [the publisher's options]
 *
 *     requests   each connection repeats its request; counted are answers, and how long each took
 *     streams    the same, and the events of each answer are counted (empty lines, not writes)
 *     paced      each connection sends its request once; the texts of the answer's events hold when they were due and
 *                written, T<due>T<written>T in ns of CLOCK_MONOTONIC: a proxy that writes events anew leaves texts as
 *                they are. Counted is from 2 s after the last began to 1 s before the first ended
 *                (--trim-begin, --trim-end)
 *     publish    no client: says {"ready": true} once the channel is open, and ends with its stdin
 *
 *     --publish-port P --session NAME [--key KEY] --answer FILE --event FILE [--events N] [--kept K] [--pace R] [--shared]
 *
 * The publisher answers plain infers with the answer's bytes, one result POST each on one of the kept connections, or,
 * shared, as a record on one upload. Streams get N events, one write each, as fast as they go, or R a second.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST_CONNECTIONS = 20000, READ_BYTES = 256 * 1024, MOST_SAMPLES = 20000000, MOST_WAITING = 100000 };
enum { TASK_BYTES = 136, STAMPED_BYTES = 512, DIGITS = 18 };

typedef struct {
    char *bytes;
    size_t begin, end, room;
} Buffer;

typedef enum { CALLER, CONTROL, REGISTER, RESULT, SHARED } Role;
typedef enum { HEAD, LENGTH, CHUNK_SIZE, CHUNK, CHUNK_END, LAST_END } State;

typedef struct Conn {
    int fd;
    Role role;
    State state;
    Buffer in, out;
    bool wants_out, is_busy, was_started;
    size_t left;
    /* A caller's. */
    Buffer *request;
    uint64_t began;
    bool at_line_start;
    char event[STAMPED_BYTES];
    size_t event_bytes;
    /* A stream's upload. */
    char task[TASK_BYTES];
    int events_left;
    uint64_t due;
    int place; /* in the heap of those that are paced, or the list of those that are not; -1: in neither */
} Conn;

typedef struct {
    uint64_t at;
    uint32_t since_written_us, since_due_us;
} Sample;

static const char *mode = "";
static int client_port, publish_port, callers = 1, events = 200, kept = 64;
static double seconds = 1, warm_s = 0.3, pace;
static const char *session = "bench", *key;
static bool want_shared, is_shared, is_ready, is_publisher, counts_events, is_paced;
static Buffer requests[256], answer, event_chunk;
static int request_count;
static char authorization[256];

static int poller;
static char scratch[READ_BYTES];
static Conn *results[MOST_CONNECTIONS], *idle[MOST_CONNECTIONS], *heap[MOST_CONNECTIONS], *running[MOST_CONNECTIONS];
static int result_count, idle_count, heap_count, running_count;
static Conn *control, *shared;
static Buffer lines, records;
static char event_name[32];
static struct {
    char task[TASK_BYTES];
    bool is_stream;
} waiting[MOST_WAITING];
static size_t waiting_first, waiting_count;
static int streams_begun;
static uint64_t record_count, taken_count;

static Conn **clients;
static uint64_t started_at, count_from, count_until;
static uint64_t answers_done, events_seen, all_answers, all_events;
static double trim_begin_s = 2, trim_end_s = 1;
static float *latencies;
static size_t latency_count;
static Sample *samples;
static size_t sample_count;
static int clients_busy, streams_started;
static uint64_t last_began, first_ended;
static bool is_done;
static double most_late_ms;

static void die(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    fputs("load: ", stderr);
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

static void put(Buffer *buffer, const void *data, size_t count) {
    if (buffer->begin == buffer->end)
        buffer->begin = buffer->end = 0;
    if (buffer->end + count > buffer->room) {
        memmove(buffer->bytes, buffer->bytes + buffer->begin, buffer->end - buffer->begin);
        buffer->end -= buffer->begin;
        buffer->begin = 0;
        if (buffer->end + count > buffer->room) {
            buffer->room = (buffer->end + count) * 2;
            buffer->bytes = must(realloc(buffer->bytes, buffer->room));
        }
    }
    memcpy(buffer->bytes + buffer->end, data, count);
    buffer->end += count;
}

static void putf(Buffer *buffer, const char *format, ...) {
    char text[2048];
    va_list rest;
    va_start(rest, format);
    int count = vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    if (count < 0 || (size_t)count >= sizeof text)
        die("a head is too long");
    put(buffer, text, (size_t)count);
}

static size_t size_of(const Buffer *buffer) { return buffer->end - buffer->begin; }

static void read_file(Buffer *buffer, const char *path) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (file == NULL)
        die("cannot read %s: %s", path, strerror(errno));
    size_t count;
    while ((count = fread(scratch, 1, sizeof scratch, file)) > 0)
        put(buffer, scratch, count);
    if (file != stdin)
        fclose(file);
}

/* Connections. -------------------------------------------------------------------------------------------------- */

static void watch(Conn *conn, bool out) {
    if (conn->wants_out == out)
        return;
    conn->wants_out = out;
    struct epoll_event what = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = conn};
    epoll_ctl(poller, EPOLL_CTL_MOD, conn->fd, &what);
}

static Conn *open_conn(Role role, int port) {
    Conn *conn = must(calloc(1, sizeof *conn));
    conn->role = role;
    conn->place = -1;
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (conn->fd < 0)
        die("no socket: %s", strerror(errno));
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    /* On loopback this returns at once, as long as the backlog has room. */
    if (connect(conn->fd, (struct sockaddr *)&where, sizeof where) < 0)
        die("cannot connect to port %d: %s", port, strerror(errno));
    int one = 1;
    setsockopt(conn->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(conn->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event what = {.events = EPOLLIN, .data.ptr = conn};
    epoll_ctl(poller, EPOLL_CTL_ADD, conn->fd, &what);
    return conn;
}

/* Write what waits. False: the peer is gone (told by the reader, who sees why). */
static bool flush(Conn *conn) {
    while (size_of(&conn->out)) {
        ssize_t count = send(conn->fd, conn->out.bytes + conn->out.begin, size_of(&conn->out), MSG_NOSIGNAL);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN) {
                watch(conn, true);
                return true;
            }
            return false;
        }
        conn->out.begin += (size_t)count;
    }
    watch(conn, false);
    return true;
}

/* The publisher. ------------------------------------------------------------------------------------------------ */

static void heap_swap(int a, int b) {
    Conn *conn = heap[a];
    heap[a] = heap[b];
    heap[b] = conn;
    heap[a]->place = a;
    heap[b]->place = b;
}

static void heap_settle(int at) {
    while (at > 0 && heap[at]->due < heap[(at - 1) / 2]->due) {
        heap_swap(at, (at - 1) / 2);
        at = (at - 1) / 2;
    }
    for (;;) {
        int least = at;
        for (int child = 2 * at + 1; child <= 2 * at + 2; child++)
            if (child < heap_count && heap[child]->due < heap[least]->due)
                least = child;
        if (least == at)
            return;
        heap_swap(at, least);
        at = least;
    }
}

static void stop_upload(Conn *conn) {
    if (conn->place < 0)
        return;
    if (pace > 0) {
        int at = conn->place;
        heap_count--;
        if (at != heap_count) {
            heap_swap(at, heap_count);
            heap_settle(at);
        }
    } else {
        running[conn->place] = running[--running_count];
        running[conn->place]->place = conn->place;
    }
    conn->place = -1;
}

static void begin_result(Conn *conn, const char *task, bool is_stream) {
    conn->is_busy = true;
    memcpy(conn->task, task, TASK_BYTES);
    putf(&conn->out, "POST /publisher/v1/tasks/%s/result HTTP/1.1\r\nHost: 127.0.0.1\r\n%s", task, authorization);
    if (!is_stream) {
        putf(&conn->out, "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n", size_of(&answer));
        put(&conn->out, answer.bytes, size_of(&answer));
        flush(conn);
        return;
    }
    putf(&conn->out, "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    conn->events_left = events;
    if (pace > 0) {
        /* Engines do not march in step: each stream has a phase of its own within the interval. */
        double phase = streams_begun++ * 0.6180339887498949;
        conn->due = now_ns() + (uint64_t)((phase - (uint64_t)phase) * 1e9 / pace);
        conn->place = heap_count;
        heap[heap_count++] = conn;
        heap_settle(conn->place);
    } else {
        conn->place = running_count;
        running[running_count++] = conn;
    }
}

static void write_event(Conn *conn) {
    if (pace > 0) {
        char text[256];
        uint64_t now = now_ns();
        double late = (double)(now - conn->due) / 1e6;
        if (late > most_late_ms)
            most_late_ms = late;
        int count = snprintf(text, sizeof text, "data: {\"choices\":[{\"delta\":{\"content\":\"T%018lluT%018lluT",
                             (unsigned long long)conn->due, (unsigned long long)now);
        memset(text + count, 'y', (size_t)(180 - 7 - count));
        memcpy(text + 180 - 7, "\"}}]}\n\n", 7);
        putf(&conn->out, "b4\r\n");
        put(&conn->out, text, 180);
        put(&conn->out, "\r\n", 2);
    } else {
        put(&conn->out, event_chunk.bytes, size_of(&event_chunk));
    }
    if (--conn->events_left == 0)
        put(&conn->out, "0\r\n\r\n", 5);
    flush(conn);
}

static void answer_task(const char *task, bool is_stream) {
    if (is_shared && !is_stream) {
        char head[TASK_BYTES + 64];
        int count = snprintf(head, sizeof head, "{\"task_id\":\"%s\",\"status\":200,\"content_type\":\"application/json\"}", task);
        size_t all = 2 + (size_t)count + size_of(&answer);
        unsigned char sizes[6] = {(unsigned char)(all >> 24), (unsigned char)(all >> 16), (unsigned char)(all >> 8),
                                  (unsigned char)all, (unsigned char)(count >> 8), (unsigned char)count};
        put(&records, sizes, sizeof sizes);
        put(&records, head, (size_t)count);
        put(&records, answer.bytes, size_of(&answer));
        record_count++;
        return;
    }
    if (idle_count > 0) {
        begin_result(idle[--idle_count], task, is_stream);
    } else if (result_count < kept) {
        Conn *conn = open_conn(RESULT, publish_port);
        results[result_count++] = conn;
        begin_result(conn, task, is_stream);
    } else {
        if (waiting_count == MOST_WAITING)
            die("more infers wait for a connection than can be");
        size_t at = (waiting_first + waiting_count++) % MOST_WAITING;
        memcpy(waiting[at].task, task, TASK_BYTES);
        waiting[at].is_stream = is_stream;
    }
}

static void result_done(Conn *conn) {
    if (conn->events_left && conn->place >= 0)
        die("an upload was answered before its end");
    conn->is_busy = false;
    if (waiting_count) {
        size_t at = waiting_first;
        waiting_first = (waiting_first + 1) % MOST_WAITING;
        waiting_count--;
        begin_result(conn, waiting[at].task, waiting[at].is_stream);
    } else {
        idle[idle_count++] = conn;
    }
}

static void forget_result(Conn *conn) {
    stop_upload(conn);
    for (int at = 0; at < result_count; at++)
        if (results[at] == conn)
            results[at] = results[--result_count];
    for (int at = 0; at < idle_count; at++)
        if (idle[at] == conn)
            idle[at] = idle[--idle_count];
    close(conn->fd);
    free(conn->in.bytes);
    free(conn->out.bytes);
    free(conn);
}

static void flush_records(void) {
    if (!size_of(&records) || size_of(&shared->out))
        return;
    putf(&shared->out, "%zx\r\n", size_of(&records));
    put(&shared->out, records.bytes + records.begin, size_of(&records));
    put(&shared->out, "\r\n", 2);
    records.begin = records.end = 0;
    flush(shared);
}

static void start_clients(void);

static void ready(void) {
    if (is_ready)
        return;
    is_ready = true;
    if (strcmp(mode, "publish") == 0) {
        puts("{\"ready\": true}");
        fflush(stdout);
    } else {
        start_clients();
    }
}

static void take_frame(const char *data, size_t count) {
    if (strcmp(event_name, "hello") == 0) {
        if (!want_shared) {
            ready();
            return;
        }
        if (memmem(data, count, "\"results\"", 9) == NULL)
            die("the broker offers no shared upload (`results` is not in hello's features)");
        is_shared = true;
        shared = open_conn(SHARED, publish_port);
        putf(&shared->out,
             "POST /publisher/v1/sessions/%s/results HTTP/1.1\r\nHost: 127.0.0.1\r\n%s"
             "Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
             session, authorization);
        flush(shared);
    } else if (strcmp(event_name, "results") == 0) {
        const char *at = memmem(data, count, "\"taken\":", 8);
        if (at != NULL)
            taken_count = strtoull(at + 8, NULL, 10);
        ready();
    } else if (strcmp(event_name, "infer") == 0) {
        const char *at = memmem(data, count, "\"task_id\":", 10);
        const char *streamed = memmem(data, count, "\"stream\":", 9);
        if (at == NULL || streamed == NULL || (at = strchr(at + 10, '"')) == NULL)
            die("an infer without a task or a stream");
        char task[TASK_BYTES] = "";
        size_t length = strcspn(++at, "\"");
        if (length >= sizeof task)
            die("a task's id is too long");
        memcpy(task, at, length);
        streamed += 9;
        answer_task(task, streamed[strspn(streamed, " ")] == 't');
    } else if (strcmp(event_name, "bye") == 0) {
        die("the broker said bye");
    }
}

static void take_lines(const char *data, size_t count) {
    put(&lines, data, count);
    for (;;) {
        char *line = lines.bytes + lines.begin, *end = memchr(line, '\n', size_of(&lines));
        if (end == NULL)
            return;
        *end = 0;
        if (strncmp(line, "event: ", 7) == 0)
            snprintf(event_name, sizeof event_name, "%s", line + 7);
        else if (strncmp(line, "data: ", 6) == 0)
            take_frame(line + 6, (size_t)(end - line) - 6);
        else if (*line == 0)
            event_name[0] = 0;
        lines.begin += (size_t)(end - line) + 1;
    }
}

static void start_publisher(void) {
    Conn *conn = open_conn(REGISTER, publish_port);
    char body[256];
    int count = snprintf(body, sizeof body, "{\"llms\":[{\"name\":\"%s\"}]}", session);
    putf(&conn->out,
         "PUT /publisher/v1/sessions/%s HTTP/1.1\r\nHost: 127.0.0.1\r\n%sContent-Type: application/json\r\n"
         "Content-Length: %d\r\n\r\n%s",
         session, authorization, count, body);
    flush(conn);
}

static void open_control(void) {
    control = open_conn(CONTROL, publish_port);
    putf(&control->out, "GET /publisher/v1/sessions/%s/frames HTTP/1.1\r\nHost: 127.0.0.1\r\n%s\r\n", session, authorization);
    flush(control);
}

/* The clients. -------------------------------------------------------------------------------------------------- */

static void ask(Conn *conn) {
    conn->began = now_ns();
    conn->at_line_start = true;
    conn->event_bytes = 0;
    conn->was_started = false;
    put(&conn->out, conn->request->bytes, size_of(conn->request));
    flush(conn);
}

static void start_clients(void) {
    started_at = now_ns();
    count_from = started_at + (uint64_t)(warm_s * 1e9);
    count_until = count_from + (uint64_t)(seconds * 1e9);
    clients = must(calloc((size_t)callers, sizeof *clients));
    for (int at = 0; at < callers; at++) {
        clients[at] = open_conn(CALLER, client_port);
        clients[at]->request = &requests[at % request_count];
    }
    clients_busy = callers;
    for (int at = 0; at < callers; at++)
        ask(clients[at]);
}

static uint64_t number_at(const char *text) {
    uint64_t value = 0;
    for (int at = 0; at < DIGITS; at++)
        value = value * 10 + (uint64_t)(text[at] - '0');
    return value;
}

static void end_of_event(Conn *conn, uint64_t now) {
    all_events++;
    if (is_paced) {
        /* One without them is a proxy's own: a first that tells the role, a last that tells why it ends. */
        static const char before[] = "\"content\":\"T";
        const char *due_at = memmem(conn->event, conn->event_bytes, before, sizeof before - 1);
        size_t left = due_at == NULL ? 0 : conn->event_bytes - (size_t)(due_at - conn->event);
        conn->event_bytes = 0;
        if (left < sizeof before - 1 + 2 * (DIGITS + 1))
            return;
        due_at += sizeof before - 1;
        if (!conn->was_started) {
            conn->was_started = true;
            streams_started++;
            last_began = now;
        }
        if (sample_count == MOST_SAMPLES)
            die("more chunks than can be counted");
        uint64_t due = number_at(due_at), written = number_at(due_at + DIGITS + 1);
        samples[sample_count++] = (Sample){now, (uint32_t)((now - written) / 1000), (uint32_t)((now - due) / 1000)};
    } else if (now >= count_from && now < count_until) {
        events_seen++;
    }
    conn->event_bytes = 0;
}

static void take_events(Conn *conn, const char *data, size_t count) {
    uint64_t now = now_ns();
    while (count) {
        const char *end = memchr(data, '\n', count);
        size_t line = end == NULL ? count : (size_t)(end - data) + 1;
        if (line == 1 && end != NULL && conn->at_line_start) {
            end_of_event(conn, now);
        } else if (is_paced && conn->event_bytes < STAMPED_BYTES) {
            size_t some = STAMPED_BYTES - conn->event_bytes < line ? STAMPED_BYTES - conn->event_bytes : line;
            memcpy(conn->event + conn->event_bytes, data, some);
            conn->event_bytes += some;
        }
        conn->at_line_start = end != NULL;
        data += line;
        count -= line;
    }
}

static void caller_done(Conn *conn) {
    uint64_t now = now_ns();
    all_answers++;
    if (is_paced) {
        if (first_ended == 0)
            first_ended = now;
        is_done = --clients_busy == 0;
        return;
    }
    bool counts = now >= count_from && now < count_until;
    answers_done += counts;
    /* A run that was too short for a single answer has at least the first one's latency. */
    if ((counts && latency_count < MOST_SAMPLES) || (now >= count_until && latency_count == 0))
        latencies[latency_count++] = (float)((double)(now - conn->began) / 1e6);
    if (now < count_until)
        ask(conn);
    else
        is_done = --clients_busy == 0;
}

/* HTTP. --------------------------------------------------------------------------------------------------------- */

static void take_body(Conn *conn, const char *data, size_t count) {
    if (conn->role == CONTROL)
        take_lines(data, count);
    else if (conn->role == CALLER && counts_events)
        take_events(conn, data, count);
}

static void done(Conn *conn) {
    conn->state = HEAD;
    switch (conn->role) {
    case CALLER:
        caller_done(conn);
        break;
    case REGISTER:
        open_control();
        break;
    case RESULT:
        result_done(conn);
        break;
    case CONTROL:
    case SHARED:
        die("the broker ended the %s", conn->role == CONTROL ? "channel" : "shared upload");
    }
}

static void take_head(Conn *conn, char *head, size_t count) {
    head[count - 1] = 0;
    if (count < 12 || strncmp(head, "HTTP/1.1 ", 9) != 0)
        die("this is no HTTP/1.1: %.100s", head);
    if (head[9] != '2')
        die("%s: %.300s", conn->role == CALLER ? "a client was answered" : "the publisher was answered", head);
    const char *length = strcasestr(head, "\ncontent-length:");
    if (length != NULL || strncmp(head + 9, "204", 3) == 0) {
        conn->left = length == NULL ? 0 : strtoul(length + 16, NULL, 10);
        conn->state = LENGTH;
    } else if (strcasestr(head, "\ntransfer-encoding: chunked") != NULL) {
        conn->state = CHUNK_SIZE;
    } else {
        die("an answer without a length: %.300s", head);
    }
}

static void parse(Conn *conn) {
    Buffer *in = &conn->in;
    for (;;) {
        char *data = in->bytes + in->begin, *end;
        size_t count = size_of(in), some;
        switch (conn->state) {
        case HEAD:
            if (count == 0 || (end = memmem(data, count, "\r\n\r\n", 4)) == NULL)
                return;
            in->begin += (size_t)(end - data) + 4;
            take_head(conn, data, (size_t)(end - data) + 4);
            break;
        case LENGTH:
            some = conn->left < count ? conn->left : count;
            take_body(conn, data, some);
            in->begin += some;
            if (conn->left -= some)
                return;
            done(conn);
            break;
        case CHUNK_SIZE:
            if (count == 0 || (end = memchr(data, '\n', count)) == NULL)
                return;
            conn->left = strtoul(data, NULL, 16);
            in->begin += (size_t)(end - data) + 1;
            conn->state = conn->left ? CHUNK : LAST_END;
            break;
        case CHUNK:
            if (count == 0)
                return;
            some = conn->left < count ? conn->left : count;
            take_body(conn, data, some);
            in->begin += some;
            if ((conn->left -= some) == 0)
                conn->state = CHUNK_END;
            break;
        case CHUNK_END:
        case LAST_END:
            if (count < 2)
                return;
            in->begin += 2;
            if (conn->state == LAST_END)
                done(conn);
            else
                conn->state = CHUNK_SIZE;
            break;
        }
    }
}

static void closed(Conn *conn) {
    if (conn->role == RESULT && !conn->is_busy) {
        forget_result(conn);
        return;
    }
    if (conn->role == REGISTER && control != NULL) {
        epoll_ctl(poller, EPOLL_CTL_DEL, conn->fd, NULL);
        close(conn->fd);
        return;
    }
    static const char *names[] = {"a client's connection", "the channel", "the registration", "a result's connection", "the shared upload"};
    die("the server closed %s", names[conn->role]);
}

static void readable(Conn *conn) {
    ssize_t count = recv(conn->fd, scratch, sizeof scratch, 0);
    if (count < 0) {
        if (errno == EAGAIN || errno == EINTR)
            return;
        count = 0;
    }
    if (count == 0) {
        closed(conn);
        return;
    }
    put(&conn->in, scratch, (size_t)count);
    parse(conn);
}

/* The loop. ----------------------------------------------------------------------------------------------------- */

static bool write_events(void) {
    bool is_more = false;
    for (int at = 0; at < running_count; at++) {
        Conn *conn = running[at];
        /* One event of each in turn, as they would come from engines: a burst of one stream is a single read over there. */
        if (conn->events_left && !conn->wants_out)
            write_event(conn);
        if (conn->events_left == 0) {
            stop_upload(conn);
            at--;
        } else if (!conn->wants_out) {
            is_more = true;
        }
    }
    return is_more;
}

/* Write what is due. Returns when the next one is. */
static uint64_t write_paced(void) {
    while (heap_count && heap[0]->due <= now_ns()) {
        Conn *conn = heap[0];
        write_event(conn);
        if (conn->events_left == 0) {
            stop_upload(conn);
        } else {
            conn->due += (uint64_t)(1e9 / pace);
            heap_settle(0);
        }
    }
    return heap_count ? heap[0]->due : 0;
}

static void run(void) {
    struct epoll_event found[512];
    while (!is_done) {
        bool is_more = pace > 0 ? false : write_events();
        uint64_t next = pace > 0 ? write_paced() : 0;
        if (is_shared)
            flush_records();
        struct timespec patience = {0, 0}, *wait = NULL;
        if (is_more) {
            wait = &patience;
        } else if (next) {
            uint64_t now = now_ns();
            if (next > now) {
                patience.tv_sec = (time_t)((next - now) / 1000000000u);
                patience.tv_nsec = (long)((next - now) % 1000000000u);
            }
            wait = &patience;
        }
        long count = syscall(SYS_epoll_pwait2, poller, found, 512, wait, NULL, 0);
        if (count < 0 && errno != EINTR)
            die("epoll_pwait2: %s", strerror(errno));
        for (long at = 0; at < count; at++) {
            Conn *conn = found[at].data.ptr;
            if (conn == NULL) {
                if (read(STDIN_FILENO, scratch, sizeof scratch) <= 0)
                    is_done = true;
                continue;
            }
            if (found[at].events & EPOLLOUT)
                flush(conn);
            if (found[at].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                readable(conn);
        }
    }
}

static int by_size(const void *left, const void *right) {
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

static double quantile(float *sorted, size_t count, double which) {
    return count ? (double)sorted[(size_t)(which * (double)(count - 1) + 0.5)] : 0;
}

static void report(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = (double)used.ru_utime.tv_sec + (double)used.ru_stime.tv_sec +
                   (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    double all_s = (double)(now_ns() - started_at) / 1e9;
    if (is_paced) {
        if (sample_count == 0)
            die("no event tells when it was written");
        uint64_t from = last_began + (uint64_t)(trim_begin_s * 1e9), until = first_ended - (uint64_t)(trim_end_s * 1e9);
        bool is_short = streams_started < callers || until <= from || first_ended < 1000000000u;
        if (is_short) {
            /* It was so far behind that its streams were never all there. All that it did has to do. */
            from = samples[0].at;
            until = samples[sample_count - 1].at + 1;
        }
        float *written = must(malloc(sizeof *written * (sample_count + 1))), *due = must(malloc(sizeof *due * (sample_count + 1)));
        size_t count = 0;
        for (size_t at = 0; at < sample_count; at++)
            if (samples[at].at >= from && samples[at].at < until) {
                written[count] = (float)samples[at].since_written_us / 1000;
                due[count++] = (float)samples[at].since_due_us / 1000;
            }
        qsort(written, count, sizeof *written, by_size);
        qsort(due, count, sizeof *due, by_size);
        double window = (double)(until - from) / 1e9;
        printf("{\"is_short\": %s, \"seconds\": %.6f, \"chunks\": %zu, \"delivered_per_s\": %.3f, \"delay_median_ms\": %.4f, \"delay_p99_ms\": %.4f, "
               "\"due_median_ms\": %.4f, \"due_p99_ms\": %.4f, \"publisher_late_ms\": %.4f, ",
               is_short ? "true" : "false", window, count, (double)count / window, quantile(written, count, 0.5), quantile(written, count, 0.99),
               quantile(due, count, 0.5), quantile(due, count, 0.99), most_late_ms);
    } else {
        qsort(latencies, latency_count, sizeof *latencies, by_size);
        printf("{\"seconds\": %.6f, \"answers\": %llu, \"events\": %llu, \"latency_median_ms\": %.5f, \"latency_p99_ms\": %.5f, ",
               seconds, (unsigned long long)answers_done, (unsigned long long)events_seen,
               quantile(latencies, latency_count, 0.5), quantile(latencies, latency_count, 0.99));
    }
    printf("\"all_answers\": %llu, \"all_events\": %llu, \"records\": %llu, \"taken\": %llu, \"cpu_s\": %.4f, \"all_s\": %.4f}\n",
           (unsigned long long)all_answers, (unsigned long long)all_events, (unsigned long long)record_count,
           (unsigned long long)taken_count, cpu_s, all_s);
}

static const char *value_of(int count, char **words, int *at) {
    if (*at + 1 >= count)
        die("%s wants a value", words[*at]);
    return words[++*at];
}

int main(int count, char **words) {
    double limit_s = 0;
    if (count < 2)
        die("MODE is missing: requests, streams, paced or publish");
    mode = words[1];
    for (int at = 2; at < count; at++) {
        const char *name = words[at];
        if (strcmp(name, "--port") == 0)
            client_port = atoi(value_of(count, words, &at));
        else if (strcmp(name, "--connections") == 0)
            callers = atoi(value_of(count, words, &at));
        else if (strcmp(name, "--seconds") == 0)
            seconds = atof(value_of(count, words, &at));
        else if (strcmp(name, "--warm") == 0)
            warm_s = atof(value_of(count, words, &at));
        else if (strcmp(name, "--trim-begin") == 0)
            trim_begin_s = atof(value_of(count, words, &at));
        else if (strcmp(name, "--trim-end") == 0)
            trim_end_s = atof(value_of(count, words, &at));
        else if (strcmp(name, "--limit") == 0)
            limit_s = atof(value_of(count, words, &at));
        else if (strcmp(name, "--request") == 0 && request_count < 256)
            read_file(&requests[request_count++], value_of(count, words, &at));
        else if (strcmp(name, "--publish-port") == 0)
            publish_port = atoi(value_of(count, words, &at));
        else if (strcmp(name, "--session") == 0)
            session = value_of(count, words, &at);
        else if (strcmp(name, "--key") == 0)
            key = value_of(count, words, &at);
        else if (strcmp(name, "--answer") == 0)
            read_file(&answer, value_of(count, words, &at));
        else if (strcmp(name, "--event") == 0) {
            Buffer text = {0};
            read_file(&text, value_of(count, words, &at));
            putf(&event_chunk, "%zx\r\n", size_of(&text));
            put(&event_chunk, text.bytes, size_of(&text));
            put(&event_chunk, "\r\n", 2);
        } else if (strcmp(name, "--events") == 0)
            events = atoi(value_of(count, words, &at));
        else if (strcmp(name, "--kept") == 0)
            kept = atoi(value_of(count, words, &at));
        else if (strcmp(name, "--pace") == 0)
            pace = atof(value_of(count, words, &at));
        else if (strcmp(name, "--shared") == 0)
            want_shared = true;
        else
            die("unknown option %s", name);
    }
    is_paced = strcmp(mode, "paced") == 0;
    counts_events = is_paced || strcmp(mode, "streams") == 0;
    is_publisher = publish_port != 0;
    bool is_client = counts_events || strcmp(mode, "requests") == 0;
    if (!is_client && (strcmp(mode, "publish") != 0 || !is_publisher))
        die("unknown mode %s, or no --publish-port", mode);
    if (is_client && (client_port == 0 || request_count == 0 || callers < 1 || callers > MOST_CONNECTIONS))
        die("%s wants --port, --request and --connections between 1 and %d", mode, MOST_CONNECTIONS);
    if (kept > MOST_CONNECTIONS || (is_publisher && (size_of(&answer) == 0 || size_of(&event_chunk) == 0)))
        die("a publisher wants --answer and --event, and --kept of at most %d", MOST_CONNECTIONS);
    if (key != NULL && (size_t)snprintf(authorization, sizeof authorization, "Authorization: Bearer %s\r\n", key) >= sizeof authorization)
        die("the key is too long");
    /* Nothing here runs on: whatever hangs ends with a signal. */
    alarm((unsigned)(limit_s > 0 ? limit_s : seconds + warm_s + 60));

    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (is_paced)
        samples = must(malloc(sizeof *samples * MOST_SAMPLES));
    else
        latencies = must(malloc(sizeof *latencies * MOST_SAMPLES));
    if (!is_client) {
        struct epoll_event what = {.events = EPOLLIN, .data.ptr = NULL};
        epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &what);
    }
    if (is_publisher)
        start_publisher();
    else
        start_clients();
    run();
    if (is_client)
        report();
    return 0;
}
