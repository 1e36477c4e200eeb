# A guest that needs no kernel: it fills its memory with words that it can recompute, then goes
# round and round, checking and rewriting one page in STRIDE, and says on the serial port how many
# were wrong. 32-bit, without paging or interrupts, so that it runs on a KVM that cannot run Linux.
#
# Entered by the PVH boot protocol, flat 32-bit protected mode. Page i holds in its j-th word
# (i * 1024 + j) * MULTIPLIER ^ g, where g is the round that wrote it last (0: the filling).
# Round r = 1, 2, ... works on the pages i with i % STRIDE = r % STRIDE; the round before that one
# on the same pages was r - STRIDE.
#
# Symbols given to the assembler: FIRST (address of page 0), PAGES, STRIDE (a power of two),
# PAUSE (ticks of the processor's clock between rounds), ROUNDS (after how many it ends; 0: never),
# END (what it then writes to the port of the ACPI controls: 0x34 switches off, 1 resets) and, where
# it is to use more than one processor, OTHERS (how many more). Each of those counts for itself from
# then on, in the double word at COUNTS + 4 * its number; the numbers begin with 1.
#
# Two more may be given, for a KVM that emulates each instruction: WORDS, how many words of a page
# the rounds look at (else all), and GO, an address. With GO it fills nothing, and waits until the
# double word there is not zero: whoever has saved it by then fills its memory and lets it go.

        .ifndef OTHERS
        .set    OTHERS, 0
        .endif
        .ifndef WORDS
        .set    WORDS, 1024
        .endif
        .set    MULTIPLIER, 0x9E3779B1
        .set    SERIAL, 0x3f8
        .set    LINE_STATUS, 0x3fd
        .set    CONTROLS, 0x600
        # Where the other processors begin, in real mode: the page that wakes them is its number.
        .set    OTHERS_AT, 0x8000
        .set    COUNTS, 0x8800
        # The low half of the local APIC's interrupt command: to all others, INIT and start-up.
        .set    APIC_COMMAND, 0xfee00300
        .set    INIT_OTHERS, 0x000c4500
        .set    START_OTHERS, 0x000c4600 + (OTHERS_AT >> 12)

        # Where the boot protocol finds the entry: note 18 of owner "Xen".
        .section .note.pvh, "a", @note
        .balign 4
        .long   4, 4, 18
        .asciz  "Xen"
        .long   start

        .section .text, "ax", @progbits
        .code32
        .globl  start
start:
        cli
        cld
        movl    $stack_end, %esp
        movl    $text_up, %esi
        call    say

        .ifdef GO
waits:
        pause
        cmpl    $0, GO
        je      waits
        .else
        # Filling: generation 0, every word of every page.
        movl    $FIRST, %edi
        xorl    %ecx, %ecx              # word number, i * 1024 + j
fill:
        imull   $MULTIPLIER, %ecx, %eax
        stosl
        incl    %ecx
        cmpl    $(PAGES * 1024), %ecx
        jb      fill
        .endif
        movl    $text_filled, %esi
        call    say

        .if     OTHERS
        movl    $other, %esi
        movl    $OTHERS_AT, %edi
        movl    $(other_end - other), %ecx
        rep movsb
        movl    $INIT_OTHERS, APIC_COMMAND
        movl    $START_OTHERS, APIC_COMMAND
        .endif

        movl    $1, %ebp                # round
round:
        movl    $0, bad
        movl    %ebp, %edx
        andl    $(STRIDE - 1), %edx     # page
        movl    %ebp, %ebx
        subl    $STRIDE, %ebx           # who wrote these pages last
        jg      pages
        xorl    %ebx, %ebx
pages:
        cmpl    $PAGES, %edx
        jae     report
        movl    %edx, %edi
        shll    $12, %edi
        addl    $FIRST, %edi
        movl    %edx, %ecx
        shll    $10, %ecx
        movl    $WORDS, %esi
words:
        imull   $MULTIPLIER, %ecx, %eax
        xorl    %ebx, %eax
        cmpl    %eax, (%edi)
        je      good
        incl    bad
good:
        xorl    %ebx, %eax
        xorl    %ebp, %eax
        stosl
        incl    %ecx
        decl    %esi
        jnz     words
        addl    $STRIDE, %edx
        jmp     pages

report:
        movl    $text_round, %esi
        call    say
        movl    %ebp, %eax
        call    number
        movl    $text_bad, %esi
        call    say
        movl    bad, %eax
        call    number
        movl    $text_end, %esi
        call    say

        cmpl    $ROUNDS, %ebp
        jne     goes_on
        movw    $CONTROLS, %dx
        movb    $END, %al
        outb    %al, %dx
goes_on:
        rdtsc
        movl    %eax, %ebx
rest:
        pause
        rdtsc
        subl    %ebx, %eax
        cmpl    $PAUSE, %eax
        jb      rest
        incl    %ebp
        jmp     round

# Prints the text at %esi, which ends with a zero. Changes %eax, %edx.
say:
        lodsb
        testb   %al, %al
        jz      said
        call    put
        jmp     say
said:
        ret

# Prints %eax as eight hexadecimal digits. Changes %eax, %ecx, %edx, %edi.
number:
        movl    %eax, %edi
        movl    $8, %ecx
digit:
        roll    $4, %edi
        movl    %edi, %eax
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     decimal
        addb    $('a' - '0' - 10), %al
decimal:
        call    put
        decl    %ecx
        jnz     digit
        ret

# Prints the character in %al, once the port takes it. Changes %edx.
put:
        movb    %al, %ah
        movw    $LINE_STATUS, %dx
busy:
        inb     %dx, %al
        testb   $0x20, %al
        jz      busy
        movw    $SERIAL, %dx
        movb    %ah, %al
        outb    %al, %dx
        ret

# What every other processor does, copied to OTHERS_AT. The number of its counter is in a register
# alone, as a saved processor has to keep it.
        .if     OTHERS
        .code16
other:
        cli
        movw    $(COUNTS >> 4), %ax
        movw    %ax, %ds
        movl    $1, %ebx
        lock xaddl %ebx, 0              # whose turn it is to take a number
        incw    %bx
        shlw    $2, %bx
count:
        incl    (%bx)
        pause
        jmp     count
other_end:
        .code32
        .endif

text_up:     .asciz "payload: up\n"
text_filled: .asciz "payload: filled\n"
text_round:  .asciz "round "
text_bad:    .asciz " bad "
text_end:    .asciz "\n"

        .balign 4
bad:    .long   0
        .space  256
stack_end:
